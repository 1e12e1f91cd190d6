"""Model FLOPs utilisation: FLOPs of a token, peak of a device, and their ratio at a measured speed."""

from __future__ import annotations

from typing import Any

import jax

from jaxcl.types import PyTree

# Dense bfloat16 FLOP/s of one JAX device, from the vendors' data sheets (without sparsity), by the beginning of
# `device_kind`; the first match counts. TPU v2 and v3 list two devices per chip, so half a chip each.
PEAKS: tuple[tuple[str, float], ...] = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA A10G", 70e12),
)


def per_token(params: float, layers: int = 0, length: int = 0, width: int = 0, *, causal: bool = False) -> float:
    """Returns the FLOPs of training on one token, forward and backward: 6 N + 12 layers x length x width.

    Chowdhery et al. 2022 (PaLM), appendix B. The second term is the attention; by convention it is not halved for
    causal masks, so that figures compare with published ones.

    Args:
      params: N, parameters that take part in a matrix product per token (active ones; without a plain embedding).
      layers: attention layers.
      length: tokens per row.
      width: H x K, the width of all heads together.
      causal: halve the attention term, which a causal mask does not need.
    """
    return 6.0 * params + 12.0 * layers * length * width * (0.5 if causal else 1.0)


def of_model(axes: PyTree, params: PyTree, length: int, trained: PyTree = None, *, active: float = 1.0) -> float:
    """Returns `per_token` of a model, told by the logical axes of its parameters.

    A parameter with two dimensions or more, not counting `layers` and with `heads` and `head` as one, is a matrix that
    every token meets once; so biases and scales do not count. A table with `vocab` or `length` first is looked up and
    does not count either, unless there is no matrix with `vocab` last: then it is the head as well (tied).
    Projections (..., embed, heads, head) are the queries of the attention, whose scores span the whole row by
    convention, although a packed document attends to itself alone. Of what is stacked along `expert` a token meets the
    share `active`, and no more is counted; the router counts in full.

    Args:
      axes: `Model.axes`.
      params: arrays or jax.ShapeDtypeStruct.
      length: L, tokens per row.
      trained: tree of bools like `params`; a frozen matrix has no gradient of its own, which saves 2 of its 6 FLOPs.
        None = all are trained.
      active: experts of a token by all experts, k / E; 1 for dense models (`Config.active`).
    """
    learning = [True] * len(jax.tree.leaves(params)) if trained is None else jax.tree.leaves(trained)
    leaves = jax.tree.leaves(params)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    matrices, queries = [], 0
    for leaf, own, learns in zip(leaves, names, learning, strict=True):
        dims = [name for name in own if name not in ("layers", "head")]
        if len(dims) > 1:
            met = active if "expert" in own else 1.0
            matrices.append(([name for name in dims if name != "expert"], leaf.size * met * (1.0 if learns else 2 / 3)))
        if own[-3:] == ("embed", "heads", "head"):
            queries += leaf.size // leaf.shape[-3]  # layers x H x K
    tied = not any(dims[-1] == "vocab" for dims, _ in matrices)
    used = sum(size for dims, size in matrices if dims[0] != "length" and (dims[0] != "vocab" or tied))
    return per_token(used, 1, length, queries)


def peak(device: Any) -> float | None:
    """Returns the peak FLOP/s of a `jax.Device` in bfloat16, or None if its kind is not known (as for a CPU)."""
    kind = getattr(device, "device_kind", str(device))
    return next((value for prefix, value in PEAKS if kind.startswith(prefix)), None)


def utilisation(tokens_per_s: float, flops_per_token: float, devices: int, peak_flops: float | None) -> float | None:
    """Returns the share of the peak of all devices that useful work takes, 0 to 1; None if the peak is not known."""
    return None if not peak_flops else tokens_per_s * flops_per_token / (devices * peak_flops)
