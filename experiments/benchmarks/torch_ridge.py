"""The peer of ridge.py: one ridge update in torch, in float64, whenever a line arrives on stdin.

Needs torch only, in an environment of its own. The argument is the case as JSON, whose `form` is
  published  the recursion from left to right, with an LU inverse; classes are one-hot columns
  ordered    the same with the best order of products: Cholesky, R - V^T V
  gram       sums of products alone, without weights
"""

import json
import resource
import sys
import time

import torch

case = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(1)
d, b, c = case["features"], case["rows"], case["classes"]
x = torch.relu(torch.randn(b, d, dtype=torch.float64))
y = torch.nn.functional.one_hot(torch.arange(b) % c, c).to(torch.float64)
r, w = torch.eye(d, dtype=torch.float64) / case["gamma"], torch.zeros(d, c, dtype=torch.float64)
one = torch.eye(b, dtype=torch.float64)


def published():
    """R - R X^T K X R."""
    k = torch.linalg.inv(one + x @ r @ x.T)
    r.sub_(r @ x.T @ k @ x @ r)
    w.add_(r @ x.T @ (y - x @ w))


def ordered():
    """R - V^T V."""
    p = r @ x.T
    lower = torch.linalg.cholesky(one + x @ p)
    v = torch.linalg.solve_triangular(lower, p.T, upper=False)
    errors = torch.linalg.solve_triangular(lower, y - x @ w, upper=False)
    r.addmm_(v.T, v, alpha=-1)
    w.addmm_(v.T, errors)


def gram():
    """A + X^T X and B + X^T Y."""
    r.addmm_(x.T, x)
    w.addmm_(x.T, y)


update = {"published": published, "ordered": ordered, "gram": gram}[case["form"]]
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"versions": {"torch": torch.__version__}}), flush=True)
for _ in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    update()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "extra_bytes": extra}), flush=True)
