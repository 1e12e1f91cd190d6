"""The peer of hyperinterval_step.py: the published step of HyperInterval on torch, whenever a line arrives on stdin.

Needs torch and numpy only, in an environment of its own. The argument is the shape as JSON. Written from the formulas
of the published step: one pass through the hypernetwork for every earlier task, with |W| formed anew in every layer of
every pass; three ends of the weights; six products in every layer of the target network; the regulariser divided twice
by the number of earlier tasks; Adam. Its assertions, which wait for every layer, are left out.

Weights of the target lie in the order bias, kernel [in, out] of one layer after the other.
"""

import json
import resource
import sys
import time

import numpy as np
import torch
from torch.nn import functional

shape = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
UNIVERSAL, GAMMA, M, TASK = shape["universal"], shape["gamma"], shape["embedding"], shape["task"]
KAPPA, BETA, ROWS = 0.5, shape["beta"], shape["rows"]
WIDTHS = list(zip(shape["widths"][:-1], shape["widths"][1:], strict=True))
SIZE = sum(a * b + b for a, b in WIDTHS)


def start():
    """Returns (weight, bias) of the layers, embeddings e and the v of their radii, drawn or from `shape["start"]`."""
    if shape["start"]:
        found = np.load(shape["start"])
        layers = [(found[f"weight_{i}"], found[f"bias_{i}"]) for i in range(len(shape["hidden"]) + 1)]
        arrays = [*(x for layer in layers for x in layer), found["centre"], found["radius"]]
        *layers, centre, radius = [torch.tensor(x, requires_grad=True) for x in arrays]
        return list(zip(layers[::2], layers[1::2], strict=True)), list(centre.split(1)), list(radius.split(1))
    layers, width = [], M
    for size in (*shape["hidden"], SIZE):
        draw = [torch.empty(s).uniform_(-1, 1).div_(width**0.5).requires_grad_() for s in ((size, width), (size,))]
        layers.append(tuple(draw))
        width = size
    return layers, [torch.randn(1, M) for _ in range(TASK + 1)], [torch.full((1, M), 1 / M) for _ in range(TASK + 1)]


layers, centres, radii = start()
# Earlier embeddings are frozen, each is a parameter of its own.
centres, radii = ([x.detach().clone() for x in parts] for parts in (centres, radii))
own = [centres[TASK].requires_grad_()] + ([] if UNIVERSAL else [radii[TASK].requires_grad_()])


def boxes(task):
    """Returns lower end, middle and upper end of the weights of a task, [SIZE]."""
    if UNIVERSAL:
        centre, radius = GAMMA / (2 * M) * torch.cos(centres[task]), torch.full((1, M), GAMMA / M)
    else:
        centre, radius = centres[task], GAMMA * functional.softmax(radii[task], dim=1)
    for i, (weight, bias) in enumerate(layers):
        centre, radius = (
            functional.linear(centre, weight, bias),
            functional.linear(radius, weight.abs(), torch.zeros_like(bias)),
        )
        if i + 1 < len(layers):
            lower, upper = functional.relu(centre - radius), functional.relu(centre + radius)
            centre, radius = (upper + lower) / 2, (upper - lower) / 2
    return (centre - radius)[0], centre[0], (centre + radius)[0]


def split(vector):
    """Returns [(bias, kernel)] of the target's layers."""
    parts, begin = [], 0
    for a, b in WIDTHS:
        bias, kernel = vector[begin : begin + b], vector[begin + b : begin + b + a * b]
        parts.append((bias, kernel.view(a, b)))
        begin += b + a * b
    return parts


def logits(ends, x):
    """Returns lower, middle and upper logits for inputs >= 0, by six products in every layer."""
    low = middle = high = x
    for i, (of_low, of_middle, of_high) in enumerate(zip(*map(split, ends), strict=True)):
        (b_low, w_low), (b_middle, w_middle), (b_high, w_high) = of_low, of_middle, of_high
        new_low = low @ w_low.clamp(min=0) + high @ w_low.clamp(max=0) + b_low
        new_high = high @ w_high.clamp(min=0) + low @ w_high.clamp(max=0) + b_high
        middle = middle @ w_middle.clamp(min=0) + middle @ w_middle.clamp(max=0) + b_middle
        low, high = new_low, new_high
        if i + 1 < len(WIDTHS):
            low, middle, high = functional.relu(low), functional.relu(middle), functional.relu(high)
    return low, middle, high


def losses(x, y, targets):
    """Returns the loss of the task, and the regulariser with its factor."""
    low, middle, high = logits(boxes(TASK), x)
    hit = functional.one_hot(y, low.shape[1]).bool()
    task = KAPPA * functional.cross_entropy(middle, y) + (1 - KAPPA) * functional.cross_entropy(
        torch.where(hit, low, high), y
    )
    pull = torch.zeros(())
    for k in range(TASK):
        ends = boxes(k)
        if UNIVERSAL:
            pull = pull + sum((a - b).pow(2).sum() for a, b in zip(ends, targets[k], strict=True)) / 3
        else:
            pull = pull + (ends[1] - targets[k][1]).pow(2).sum()
    return task, BETA * (pull / max(TASK, 1)) / max(TASK, 1)


optimizer = torch.optim.Adam([x for layer in layers for x in layer] + own, lr=1e-3)
draw = np.random.default_rng(1)
x = torch.tensor(draw.random((ROWS, shape["widths"][0]), np.float32))
y = torch.tensor(draw.integers(0, shape["widths"][-1], ROWS))
with torch.no_grad():
    targets = [boxes(k) for k in range(TASK)]
count = sum(p.numel() for layer in layers for p in layer)
print(json.dumps({"params": count, "versions": {"torch": torch.__version__}}), flush=True)
for _ in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    optimizer.zero_grad()
    task, pull = losses(x, y, targets)
    (task + pull).backward()
    optimizer.step()
    told = {"loss": task.item(), "drift": pull.item()}
    told |= {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    told["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(told), flush=True)
