"""Continual pre-training of 1, 8 and 70 billion parameters on a pod: new text with 5 % replay of old.

Claim:    the whole train step compiles, fits and donates its state on the machines of experiments/aot/README.md.
Command:  python -m jaxcl.main --config=configs/pod.py:8b --config.tokenizer.path=FOLDER --workdir=/mnt/... (every host)
          tpu/babysit.sh ... -- --config=configs/pod.py:8b ...     (gives it on all hosts of a slice: tpu/README.md)
          python -m jaxcl.aot --topology=v5p:8x8x4 --config=configs/pod.py:8b     (on any machine, before there is one)
Expected: loss curves of a run; for the second command the tables in experiments/aot/README.md.

Rows are cut over all devices, and so are parameters, gradients and moments (fsdp). Name your text:
  --config.sources.old.path='old/*.jsonl.zst' --config.sources.new.path='new/*.jsonl.zst'
A released model instead of a new one: --config=configs/cpt_hf.py with the mesh and the batch below.
"""

from ml_collections import ConfigDict

PRESETS = {"1b": "1b", "8b": "llama3-8b", "70b": "llama3-70b"}
VOCAB = {"1b": 32_000, "8b": 128_256, "70b": 128_256}


def get_config(name="1b"):
    if name not in PRESETS:
        raise ValueError(f"--config=configs/pod.py:{name}: no such size; choose from {', '.join(PRESETS)}")
    config = ConfigDict()
    config.label = name
    config.seed = 0

    config.model = ConfigDict({"name": "transformer", "preset": PRESETS[name], "vocab": VOCAB[name]})
    config.model.update({"compute_dtype": "bfloat16", "remat": "full"})
    config.tokenizer = ConfigDict({"name": "hf", "path": "tokenizer"})
    config.sources = ConfigDict({d: {"name": "jsonl", "path": f"{d}/*.jsonl.zst"} for d in ("old", "new")})
    config.packing = ConfigDict({"length": 4096})

    config.stream = ConfigDict({"batch": 256, "steps": 10_000})
    config.stream.stages = ({"name": "new", "mixture": {"new": 0.95, "old": 0.05}},)

    config.method = "cpt"
    config.optim = ConfigDict({"name": "adamw", "weight_decay": 0.1, "clip": 1.0})
    config.schedule = ConfigDict({"name": "infinite", "peak": 3e-5, "constant": 2e-5, "warmup": 200, "cooldown": 2000})
    config.guard = ConfigDict({"spike": 20.0})

    config.evaluation = ConfigDict({"every": 500, "rows": 256})
    config.checkpoint = ConfigDict({"every_steps": 500, "every_minutes": 20.0, "keep": 2})
    config.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return config
