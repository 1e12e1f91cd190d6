"""Which way to the weights is cheapest: a solve, a few iterations with an old factor, or the recursion.

Operations are multiplications and additions in float32, bytes are reads and writes of the d x d state. Seconds are the
larger of the two at the given speeds, so that only their ratio decides.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxcl import schema


class Cost(NamedTuple):
    """What one way costs between two sets of weights.

    Attributes:
      operations: float32 operations.
      bytes: moved to and from memory.
      seconds: the larger of both at the given speeds.
    """

    operations: float
    bytes: float
    seconds: float


class Choice(NamedTuple):
    """The cheapest way and why.

    Attributes:
      name: 'solve', 'refresh' or 'recursion'.
      why: one sentence.
      costs: name -> cost, of all three.
    """

    name: str
    why: str
    costs: dict[str, Cost]


def choose(
    features: int,
    rows: int,
    classes: int,
    updates: int,
    *,
    iterations: int = 6,
    speed: float = 1e12,
    bandwidth: float = 1e11,
) -> Choice:
    """Returns the cheapest way to weights after every `updates` batches.

    Args:
      features: d.
      rows: b, rows of a batch.
      classes: C.
      updates: batches between two uses of the weights.
      iterations: of conjugate gradients for `solve.refresh`.
      speed: operations per second.
      bandwidth: bytes per second.

    Raises:
      UserError: a number that is not positive.
    """
    for field, value in locals().items():
        if not value > 0:
            raise schema.UserError(f"{field}={value}: expected a positive number")
    d, b, c, t = features, rows, classes, updates

    def cost(operations: float, moved: float) -> Cost:
        return Cost(operations, moved, max(operations / speed, moved / bandwidth))

    sums, kept = 6 * d * d * b * t, 16 * d * d * t  # the moments, which every way needs
    residual = 12 * d * d * c
    costs = {
        "solve": cost(sums + d**3 / 3 + 3 * (residual + 16 * d * d * c), kept + 40 * d * d),
        "refresh": cost(sums + residual + 4 * d * d * c * iterations, kept + 8 * d * d * (iterations + 1)),
        "recursion": cost(sums + t * (3 * d * d * b + 3 * d * b * b + 4 * d * b * c), kept + 12 * d * d * t),
    }
    name = min(costs, key=lambda n: costs[n].seconds)
    others = ", ".join(f"{n} {costs[n].seconds / costs[name].seconds:.2f} times" for n in costs if n != name)
    limit = "operations" if costs[name].operations / speed >= costs[name].bytes / bandwidth else "memory traffic"
    when = "every batch" if t == 1 else f"every {t} batches"
    why = f"weights after {when} of {b} rows at d={d}, C={c}: {name} is cheapest, by {limit} ({others} that)"
    return Choice(name, why, costs)
