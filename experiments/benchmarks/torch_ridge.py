"""The peer of ridge.py: one recursive ridge update in torch as it was published, whenever a line arrives on stdin.

Needs torch only, in an environment of its own. The argument is the case as JSON. The product is taken from left to
right, in float64, with an LU inverse; classes are one-hot columns.
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
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"versions": {"torch": torch.__version__}}), flush=True)
for _ in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    k = torch.linalg.inv(torch.eye(b, dtype=torch.float64) + x @ r @ x.T)
    r -= r @ x.T @ k @ x @ r
    w += r @ x.T @ (y - x @ w)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "extra_bytes": extra}), flush=True)
