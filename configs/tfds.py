"""Training on a dataset of TensorFlow Datasets, by name: continual pre-training on text, or a classifier of images.

Claim:    a corpus that TFDS knows is trained on without TensorFlow, once it is prepared as ArrayRecord.
Command:  TFDS_DATA_DIR=FOLDER python -m jaxcl.main --config=configs/tfds.py:wiki40b --workdir=runs/wiki40b
Expected: report.html in the workdir; a dataset that is not prepared ends the run in one line with the remedy.

Text: wiki40b, c4 and gsm8k (questions and answers as conversations). Images, five tasks of classes: mnist, cifar100.
"""

from ml_collections import ConfigDict

TEXT = {
    "wiki40b": {"dataset": "wiki40b/en", "licence": "CC-BY-SA-3.0"},
    "c4": {"dataset": "c4/en", "licence": "ODC-By-1.0"},
    "gsm8k": {"dataset": "gsm8k", "prompt": "question", "response": "answer", "licence": "MIT"},
}
IMAGES = {"mnist": (28 * 28, 10), "cifar100": (32 * 32 * 3, 100)}  # inputs, classes
TASKS = 5


def get_config(name="wiki40b"):
    if name not in (*TEXT, *IMAGES):
        raise ValueError(f"--config=configs/tfds.py:{name}: no such dataset; choose from {', '.join((*TEXT, *IMAGES))}")
    config = ConfigDict({"label": name, "seed": 0, "method": "cpt"})
    _images(config, name) if name in IMAGES else _text(config, name)

    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.1, "clip": 1.0})
    config.schedule = ConfigDict({"name": "cosine", "peak": 3e-3, "warmup": 20})
    config.guard = ConfigDict({"spike": 20.0})
    config.checkpoint = ConfigDict({"every_steps": 100, "every_minutes": 5.0, "keep": 2})
    return config


def _text(config, name):
    config.model = ConfigDict({"name": "transformer", "preset": "small"})
    config.tokenizer = ConfigDict({"name": "byte"})
    config.sources = ConfigDict({name: {"name": "tfds", "data_dir": None, "max_bytes": 20_000_000, **TEXT[name]}})
    config.packing = ConfigDict({"length": 256})
    config.stream = ConfigDict({"batch": 16, "steps": 400})
    config.stream.stages = ({"name": name, "mixture": {name: 1.0}},)
    config.evaluation = ConfigDict({"every": 50, "rows": 32})


def _images(config, name):
    inputs, classes = IMAGES[name]
    share = classes // TASKS
    tasks = {
        f"classes_{t * share}_{(t + 1) * share - 1}": tuple(range(t * share, (t + 1) * share)) for t in range(TASKS)
    }
    config.model = ConfigDict({"name": "mlp", "inputs": inputs, "hidden": (256, 256), "classes": classes})
    data = {"name": "images", "dataset": name, "data_dir": None, "relabel": False}
    config.sources = ConfigDict({task: {**data, "classes": labels} for task, labels in tasks.items()})
    config.stream = ConfigDict({"batch": 64, "steps": 200})
    config.stream.stages = tuple({"name": task, "mixture": {task: 1.0}} for task in tasks)
    config.method = "er(capacity=1000, fraction=0.5)"
    config.evaluation = ConfigDict({"every": 50, "rows": 2000})
