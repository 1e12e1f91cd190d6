"""Analytic learning at the sizes of its papers, on a bank of features of your frozen network.

Bank:     JAXCL_BANK: an .npz of np.savez with train_features [N, D], train_labels, test_features, test_labels, or a
          folder of these as .npy; only the rows of a batch are read. Here it is CIFAR-100: 100 classes of 500 rows.
Command:  JAXCL_BANK=bank.npz python -m jaxcl.main --config=configs/analytic_papers.py:ranpac --workdir=runs/ranpac
Claim:    the published settings are these options; what a paper has measured is in its line.
Expected: not measured here, with none of these networks; the same methods on MNIST and Omniglot: experiments/analytic.

Part      D, features, gamma       protocol; published accuracy in percent
acil      64, 8192, 0.1            half of the classes, then 10 tasks; mean of the ends 66.1 (Zhuang et al. 2022)
gacil     384, 5000, 100 / 3       Si-Blurry; A_AUC 58.0, A_avg 56.2, A_last 70.3 (Zhuang et al. 2024). Its code
          fits every batch three times, which is a third of its gamma of 100
dsal      64, 2 x 8192, 0.1        half, then 25 tasks; mean 71.3, last 64.0 (the authors' repository)
gkeal     64, 8192, 0.1, sigma 10  half, then 25 tasks; mean 70.4, last 62.3 (the authors' repository)
ranpac    768, 10000, chosen       ten tasks; not looked up
slda      512, none                ten tasks; not looked up
fecam     64, none                 half, then 10 tasks; not looked up
aef_ocl   768, 8192, 0.1           ten tasks of a long tail, 100 : 1; the paper's own data are others, sizes as of acil
air       64, 8192, 0.1            the same
"""

import os

from ml_collections import ConfigDict

from jaxcl.data import scenarios

CLASSES, ROWS = 100, 500
RELU = {"name": "analytic", "expansion": "relu", "width": 8192}
NONE = {"name": "analytic", "expansion": "none"}
# part -> method, adapter, D, protocol, batch
PARTS = {
    "acil": ("acil(gamma=0.1)", RELU, 64, ("half", 10), 256),
    "gacil": (f"acil(gamma={100 / 3!r}, every=16)", RELU | {"width": 5000}, 384, ("blurry", 5), 64),
    "dsal": ("ds_al(gamma=0.1, gamma_comp=0.1, ratio=0.6)", RELU | {"expansion": "dual"}, 64, ("half", 25), 256),
    "gkeal": ("gkeal(gamma=0.1)", RELU | {"expansion": "gaussian", "sigma": 10.0}, 64, ("half", 25), 256),
    "ranpac": ("ranpac", RELU | {"width": 10000, "scale": "normal"}, 768, ("even", 10), 128),
    "slda": ("slda(epsilon=1e-4)", NONE, 512, ("even", 10), 128),
    "fecam": ("fecam(gamma1=1.0, gamma2=1.0)", NONE | {"head": "mahalanobis", "power": 0.5}, 64, ("half", 10), 128),
    "aef_ocl": ("aef_ocl(gamma=0.1)", RELU, 768, ("tail", 10), 32),
    "air": ("air(gamma=0.1, slots=10)", RELU, 64, ("tail", 10), 32),
}


def streams(source, protocol, tasks, batch):
    """Returns sources and stages: one pass over whole batches."""
    if protocol == "blurry":
        return scenarios.si_blurry(source, [ROWS] * CLASSES, tasks, batch=batch)
    counts = [ROWS * (100 ** (-label / (CLASSES - 1)) if protocol == "tail" else 1) for label in range(CLASSES)]
    source = source | ({"imbalance": 100.0} if protocol == "tail" else {})
    base = CLASSES // 2 if protocol == "half" else 0
    sources, stages = scenarios.class_incremental(source, CLASSES, tasks, base=base)
    rows = [sum(round(counts[label]) for label in one["classes"]) for one in sources.values()]
    return sources, tuple(one | {"steps": n // batch} for one, n in zip(stages, rows, strict=True))


def get_config(part="acil"):
    if part not in PARTS:
        raise ValueError(f"--config=configs/analytic_papers.py:{part}: no such part; choose from {', '.join(PARTS)}")
    method, adapter, inputs, (protocol, tasks), batch = PARTS[part]
    source = {"name": "features", "path": os.environ.get("JAXCL_BANK", "bank.npz")}
    sources, stages = streams(source, protocol, tasks, batch)
    config = ConfigDict({"seed": 0, "method": method, "adapter": ConfigDict(adapter), "sources": ConfigDict(sources)})
    config.model = ConfigDict({"name": "mlp", "inputs": inputs, "hidden": (), "classes": CLASSES})  # inputs: D
    config.stream = ConfigDict({"batch": batch, "stages": stages})
    config.optim = ConfigDict({"name": "adamw"})  # of no use to a head in closed form
    config.schedule = ConfigDict({"name": "constant", "peak": 1e-3})
    config.evaluation = ConfigDict({"every": 16 if protocol == "blurry" else 10**6, "rows": 10_000})
    config.checkpoint = ConfigDict({"every_steps": 10**9, "every_minutes": 10.0, "keep": 1})
    config.mesh = ConfigDict({"data": 1})
    return config
