"""Streams of MNIST and Omniglot for analytic learning: one run of ACIL, or the training of the network below it.

Parts:    pixels      MNIST, two digits at a time; features are pixels
          random      the same on a convolutional network that is not trained
          trained     the same on one that is trained on the first two digits
          omniglot    242 characters of 15 images: 62, then twenty at a time; network trained on the first 62
          imbalanced  MNIST with 1,200 images of the first digit and 12 of the last, on the untrained network
          blurry      Si-Blurry MNIST, on the untrained network: half of the digits in one task each, 10 % anywhere
          backbone_mnist, backbone_omniglot    train the network on the first task
Command:  JAXCL_ANALYTIC=runs/analytic/data python -m jaxcl.main --config=configs/analytic_streams.py:blurry,3 \
              --workdir=runs/blurry3
Claim:    the head is that of all rows at once on real images too, with labels that come again, or rarely.
Expected: experiments/analytic/README.md; some 5 CPU-seconds a run, 20 that of a network.

A seed, after the comma, is the order of the classes, the draw of the rows and the expansion. Images and features lie in
JAXCL_ANALYTIC; experiments/analytic/launch.py makes them of your MNIST and Omniglot. One pass over whole batches.
"""

import os

from ml_collections import ConfigDict

from jaxcl.data import scenarios

CNN = {"name": "cnn", "inputs": (28, 28, 1), "channels": (16, 32, 64), "hidden": ()}
DIGITS, CHARACTERS, BASE, ROWS = 10, 242, 62, 1200
TAIL = [round(ROWS * 100 ** (-digit / 9)) for digit in range(DIGITS)]
BLURRED = (1, 8, 9, 13, 14)  # the first seeds of Si-Blurry that leave every task a class of its own
# part -> file, numbers in a row, batch, width of the expansion
PARTS = {
    "pixels": ("mnist", 784, 120, 512),
    "random": ("mnist-random", 576, 120, 512),
    "trained": ("mnist-trained", 576, 120, 512),
    "omniglot": ("omniglot-trained", 576, 100, 1024),
    "imbalanced": ("mnist-random", 576, 16, 512),
    "blurry": ("mnist-random", 576, 128, 512),
    "backbone_mnist": ("mnist", 784, 60, None),
    "backbone_omniglot": ("omniglot", 784, 30, None),
}
EPOCHS = {"backbone_mnist": 2, "backbone_omniglot": 10}


def streams(part, seed, source, batch):
    """Returns sources and stages."""
    if part == "blurry":
        return scenarios.si_blurry(source, [ROWS] * DIGITS, batch=batch, seed=BLURRED[seed % len(BLURRED)])
    if "omniglot" in part:
        sources, stages = scenarios.class_incremental(source, CHARACTERS, 9, base=BASE)
        rows = [15 * len(one["classes"]) for one in sources.values()]
    else:
        sources, stages = scenarios.class_incremental(source, DIGITS, 5)
        rows = [sum((TAIL if part == "imbalanced" else [ROWS] * DIGITS)[2 * t : 2 * t + 2]) for t in range(5)]
    times = EPOCHS.get(part, 1)
    return sources, tuple(one | {"steps": times * n // batch} for one, n in zip(stages, rows, strict=True))


def get_config(text="pixels,0"):
    part, _, seed = text.partition(",")
    if part not in PARTS or not (seed or "0").isdecimal():
        raise ValueError(f"--config=configs/analytic_streams.py:{text}: is no PART or PART,SEED; see its first lines")
    name, inputs, batch, width = PARTS[part]
    seed, folder = int(seed or 0), os.environ.get("JAXCL_ANALYTIC", "runs/analytic/data")
    source = {"name": "images" if inputs == 784 else "features", "path": f"{folder}/{name}-{seed}.npz"}
    sources, stages = streams(part, seed, source | ({"imbalance": 100.0} if part == "imbalanced" else {}), batch)
    config = ConfigDict({"seed": seed, "method": "acil(gamma=1.0)" if width else "cpt"})
    classes = CHARACTERS if "omniglot" in part else DIGITS
    model = {"name": "mlp", "inputs": inputs, "hidden": ()} if width else CNN
    config.model = ConfigDict(model | {"classes": classes})
    config.adapter = ConfigDict({"name": "analytic", "expansion": "relu", "width": width}) if width else None
    config.sources = ConfigDict(sources if width else {"task_00": sources["task_00"]})
    config.stream = ConfigDict({"batch": batch, "stages": stages if width else stages[:1]})
    config.optim = ConfigDict({"name": "adamw"})  # of the parts that train
    config.schedule = ConfigDict({"name": "constant", "peak": 1e-3})
    config.evaluation = ConfigDict({"every": 8 if part == "blurry" else 10**6, "rows": 4000})
    config.checkpoint = ConfigDict({"every_steps": 10**9, "every_minutes": 10.0, "keep": 1})
    return config
