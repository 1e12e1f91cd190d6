"""Analytic learning beside training and nearest means: methods on the streams of configs/analytic_streams.py.

Parts:    pixels, random, trained, omniglot, imbalanced, blurry: see there; PART,SEED is one seed
Command:  python experiments/analytic/launch.py --mnist=FOLDER --omniglot=FOLDER --workdir=runs/analytic
          JAXCL_ANALYTIC=runs/analytic/data python -m jaxcl.main --config=configs/analytic_compare.py:blurry,3 \
              --workdir=runs/blurry3        # one seed alone, of images and features that the launcher has made
Claim:    ridge heads are at least as good as nearest means, and those better than training, on every stream.
Expected: experiments/analytic/README.md, with the time of each part.

`naive` trains a head of the same inputs, several times over the rows of a task; on a blurred stream once, as all others
do; on pixels it is a perceptron. gamma is 1 but for `ranpac`, which chooses its own: it was looked at on seed 9.
"""

from ml_collections import ConfigDict

from configs import analytic_streams

RELU = {"expansion": "relu", "width": 512}
PLAIN = {"expansion": "none"}
UNIT = PLAIN | {"normalise": True}
DISTANCES = PLAIN | {"head": "mahalanobis", "power": 0.5, "shared": True}
OFTEN = "gamma=1.0, every=8"
# label -> method, adapter
ARMS = {
    "nmc": ("nmc", UNIT),
    "acil": ("acil(gamma=1.0)", RELU),
    "ranpac": ("ranpac", RELU | {"scale": "normal"}),
    "slda": ("slda", PLAIN),
    "fecam": ("fecam", DISTANCES),
    "ds_al": ("ds_al(gamma=1.0, gamma_comp=1.0)", RELU | {"expansion": "dual"}),
    "gkeal": ("gkeal(gamma=1.0)", RELU | {"expansion": "gaussian", "sigma": 10.0}),
    "aef_ocl": ("aef_ocl(gamma=1.0)", RELU),
    "air": ("air(gamma=1.0, slots=2)", RELU),
}
# the same with weights after every 1,024 rows; without the gain of labels that come again
BLURRED = {
    "nmc": ARMS["nmc"],
    "acil": (f"acil({OFTEN})", RELU),
    "acil without gain": (f"acil({OFTEN}, gain=False)", RELU),
    "slda": ("slda(every=8)", PLAIN),
    "air": (f"air({OFTEN})", RELU),
}
FIVE = ("nmc", "acil", "ranpac", "slda", "fecam")
PARTS = {
    "pixels": (*FIVE, "ds_al", "gkeal"),
    "random": ("nmc", "acil", "slda"),
    "trained": FIVE,
    "omniglot": (*FIVE, "gkeal"),
    "imbalanced": ("nmc", "acil", "aef_ocl", "air"),
    "blurry": tuple(BLURRED),
}
TIMES = {"omniglot": 10, "blurry": 1}  # that naive sees the rows of a task; 4 elsewhere
SHARE = 4  # batches of naive for one of the others


def naive(part, config):
    """Returns the changes that make a run train its head."""
    share = 1 if part == "imbalanced" else SHARE
    times = share * TIMES.get(part, 4)
    stages = tuple({**stage, "steps": times * stage["steps"]} for stage in config.stream.stages)
    pairs = {"method": "cpt", "adapter": None, "stream.stages": stages, "stream.batch": config.stream.batch // share}
    pairs |= {"evaluation.every": share * config.evaluation.every}
    return (*pairs.items(), ("model.hidden", (128,) if part == "pixels" else ()))


def get_config(text="pixels,0"):
    part = text.partition(",")[0]
    if part not in PARTS:
        raise ValueError(f"--config=configs/analytic_compare.py:{text}: is no PART or PART,SEED; see its first lines")
    config = analytic_streams.get_config(text)
    arms = {"naive": naive(part, config)}
    for label in PARTS[part]:
        method, adapter = (BLURRED if part == "blurry" else ARMS)[label]
        wide = {"width": config.adapter.width} if "width" in adapter else {}
        arms[label] = (("method", method), ("adapter", {"name": "analytic"} | adapter | wide))
    config.variants = tuple(ConfigDict({"label": label, "set": pairs}) for label, pairs in arms.items())
    config.seeds, config.control = (config.seed,), "naive"
    return config
