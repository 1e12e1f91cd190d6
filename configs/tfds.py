"""Continual pre-training on a dataset of TensorFlow Datasets, by name.

Claim:    a corpus that TFDS knows is trained on without TensorFlow, once it is prepared as ArrayRecord.
Command:  python -m jaxcl.main --config=configs/tfds.py:wiki40b --config.sources.wiki40b.data_dir=FOLDER
Expected: report.html in the workdir; a dataset that is not prepared ends the run in one line with the remedy.

Names: wiki40b, c4 (text) and gsm8k (questions and answers as conversations). Images: `jaxcl.data.images.load`.
"""

from ml_collections import ConfigDict

DATASETS = {
    "wiki40b": {"dataset": "wiki40b/en", "licence": "CC-BY-SA-3.0"},
    "c4": {"dataset": "c4/en", "licence": "ODC-By-1.0"},
    "gsm8k": {"dataset": "gsm8k", "prompt": "question", "response": "answer", "licence": "MIT"},
}


def get_config(name="wiki40b"):
    if name not in DATASETS:
        raise ValueError(f"--config=configs/tfds.py:{name}: no such dataset; choose from {', '.join(DATASETS)}")
    config = ConfigDict()
    config.label = name
    config.seed = 0

    config.model = ConfigDict({"name": "transformer", "preset": "small"})
    config.tokenizer = ConfigDict({"name": "byte"})
    config.sources = ConfigDict({name: {"name": "tfds", "max_bytes": 20_000_000, **DATASETS[name]}})
    config.packing = ConfigDict({"length": 256})

    config.stream = ConfigDict({"batch": 16, "steps": 400})
    config.stream.stages = ({"name": name, "mixture": {name: 1.0}},)

    config.method = "cpt"
    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.1, "clip": 1.0})
    config.schedule = ConfigDict({"name": "cosine", "peak": 3e-3, "warmup": 20})
    config.guard = ConfigDict({"spike": 20.0})

    config.evaluation = ConfigDict({"every": 50, "rows": 32})
    config.checkpoint = ConfigDict({"every_steps": 100, "every_minutes": 5.0, "keep": 2})
    return config
