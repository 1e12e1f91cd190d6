"""Compiles Pallas kernels of one program for a chip that is not here, and reads figures off their machine code.

python -m experiments.static.machine_code PROGRAM     (of PROGRAMS; prints JSON: figures of every kernel by name)

The compilers read where to write machine code from the environment when they are loaded: one process per program.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.aot import topology

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1", "h200": "h200:1"}
WIDTHS = (64, 128, 256)
TOKENS, WIDTH, VOCAB = 2048, 2048, 32768  # of the vocabulary kernels
LAYER, TASKS, SYMBOLS = (65_600, 100), 6, 124  # of the boxes: N and K, T, S
FEATURES, ROWS = 4096, 128  # of the ridge kernels
# Tensor-core instructions of Hopper; all but the first are those of older chips, at half its speed or less.
PRODUCTS = ("HGMMA", "HMMA", "IMMA", "DMMA", "BMMA", "QMMA")
ATOMICS = ("RED", "REDG", "ATOM", "ATOMG", "ATOMS", "UBLKRED", "UTMAREDG")


BOXES = ("affine", "affine_backward", "row_sums", "row_sums_backward", "update")


class Program(NamedTuple):
    """What is compiled in one process: `make` returns a function and the shapes of its arguments."""

    chip: str
    kernels: tuple[str, ...]
    make: Callable[[], tuple[Callable[..., Any], Any]]


def attention(chip: str, width: int, wanted: tuple[str, ...]) -> tuple[Callable[..., Any], Any]:
    """Packed, causal and grouped attention in bfloat16, and of it the kernels `wanted`."""
    import jax
    import jax.numpy as jnp

    from jaxcl.kernels.attention import gpu, gpu_backward, tpu

    hopper = chip == "h200"
    rows, length, heads, groups = (2, 8192, 16, 4) if hopper else (1, 2048, 4, 2)
    forward, backward = (gpu.forward, gpu_backward.backward) if hopper else (tpu.forward, tpu.backward)
    options = {"causal": True, "scale": 1 / math.sqrt(width)}

    def run(q, k, v, segments, mixed, lse, d_mixed):
        out = {}
        if "forward" in wanted:
            out["forward"] = forward(q, k, v, segments, None, **options)
        d_q, d_k, d_v = backward(q, k, v, segments, None, None, mixed, lse, d_mixed, None, **options)
        out |= {"d_queries": d_q, "d_keys": (d_k, d_v)}
        return [out[name] for name in wanted]  # what is not returned is not compiled

    q, k = (jax.ShapeDtypeStruct((rows, length, n, width), jnp.bfloat16) for n in (heads, groups))
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return run, (q, k, k, segments, q, jax.ShapeDtypeStruct((rows, heads, length), jnp.float32), q)


def vocabulary() -> tuple[Callable[..., Any], Any]:
    """Cross-entropy, both passes, and the mixture of embeddings in bfloat16."""
    import jax
    import jax.numpy as jnp

    from jaxcl.kernels.vocabulary import tpu

    def run(hidden, head, embedding, targets, inverse, d_logp, d_lse):
        logp, lse = tpu.cross_entropy(hidden, head, targets)
        gradients = tpu.cross_entropy_backward(hidden, head, targets, lse, d_logp, d_lse)
        return logp, lse, gradients, tpu.mixture(hidden, head, embedding, inverse)

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    half, single = jnp.bfloat16, jnp.float32
    matrices = of(half, TOKENS, WIDTH), of(half, WIDTH, VOCAB), of(half, VOCAB, WIDTH)
    return run, (*matrices, of(jnp.int32, TOKENS), of(single), of(single, TOKENS), of(single, TOKENS))


def boxes() -> tuple[Callable[..., Any], Any]:
    """Boxes and generators through the last layer of a hypernetwork, both passes, and its step of Adam, in float32."""
    import jax
    import jax.numpy as jnp

    from jaxcl.kernels.boxes import tpu

    def run(weight, bias, centre, radius, generators, d_centre, d_radius, numbers):
        out = [tpu.affine(weight, bias, centre, radius), tpu.row_sums(weight, generators)]
        out += [tpu.affine_backward(weight, centre, radius, d_centre, d_radius)]
        out += [tpu.row_sums_backward(weight, generators, d_centre[0])]
        return out, tpu.update(weight, weight, weight, centre, radius, d_centre, d_radius, numbers)

    rows, width = LAYER
    sizes = LAYER, (rows,), (TASKS, width), (TASKS, width), (SYMBOLS, width), (TASKS, rows), (TASKS, rows), (6,)
    return run, tuple(jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes)


def ridge(wanted: tuple[str, ...], module: str) -> tuple[Callable[..., Any], Any]:
    """Updates of symmetric matrices in float32 and in pairs of it; of a platform's `module` those `wanted`."""
    import jax
    import jax.numpy as jnp

    from jaxcl.kernels.ridge import hopper, tpu
    from jaxcl.kernels.ridge.pair import Pair

    forms = {"hopper": hopper, "tpu": tpu}[module]

    def run(a, r, more, x, v):
        operands = {"gram_update": (a, x), "downdate": (r, v), "stream": (more, v, v)}
        return [getattr(forms, name)(*operands[name]) for name in wanted]

    matrix, rows = (jax.ShapeDtypeStruct((n, FEATURES), jnp.float32) for n in (FEATURES, ROWS))
    return run, (Pair(matrix, matrix), matrix, matrix, Pair(rows, rows), rows)


def _programs() -> dict[str, Program]:
    """TPU dumps name the kernels, GPU dumps do not: there every kernel is a program."""
    out, passes = {}, ("forward", "d_queries", "d_keys")
    for width in WIDTHS:
        for name in passes:
            make = functools.partial(attention, "h200", width, (name,))
            out[f"attention h200 {width} {name}"] = Program("h200", (name,), make)
    make = functools.partial(ridge, ("downdate",), "hopper")
    out["ridge h200 downdate"] = Program("h200", ("downdate",), make)
    for chip in (x for x in CHIPS if x != "h200"):
        for width in WIDTHS:
            make = functools.partial(attention, chip, width, passes)
            out[f"attention {chip} {width}"] = Program(chip, passes, make)
        out[f"boxes {chip}"] = Program(chip, BOXES, boxes)
        updates = ("gram_update", "downdate", "stream")
        out[f"ridge {chip}"] = Program(chip, updates, functools.partial(ridge, updates, "tpu"))
        out[f"vocabulary {chip}"] = Program(chip, ("cross_entropy", "d_hidden", "d_head", "mixture"), vocabulary)
    return out


PROGRAMS = _programs()


def names(program: str) -> list[str]:
    """Returns the kernels of a program as they are called in golden.json."""
    kernels = PROGRAMS[program].kernels
    return [program] if program.endswith(kernels[0]) else [f"{program} {kernel}" for kernel in kernels]


class Line(NamedTuple):
    """An instruction of a listing."""

    name: str
    falls: bool  # whether the next one may follow
    target: int | None  # number of the instruction that it may jump to


def instructions(listing: str) -> list[Line]:
    """Returns the instructions of one kernel as nvdisasm lists them."""
    labels: dict[str, int] = {}
    found: list[re.Match[str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            found.append(match)
    out = []
    for match in found:
        predicate, name, operands = match.groups()
        target = re.search(r"(.*)`\((\.L_x_\d+)\)", operands) if name == "BRA" else None
        certain = not predicate and not (target and "P" in target[1])
        out.append(Line(name, not (name in ("BRA", "EXIT") and certain), labels[target[2]] if target else None))
    return out


def shortest(code: list[Line], begin: int, end: int) -> int | None:
    """Returns the fewest instructions from `begin` to `end`, both counted, without leaving them; None = no way."""
    seen, front, steps = {begin}, [begin], 1
    while front:
        if end in front:
            return steps
        reached = {i + 1 for i in front if code[i].falls} | {code[i].target for i in front}
        front = [i for i in reached - seen if i is not None and begin <= i <= end]
        seen.update(front)
        steps += 1
    return None


def hopper(report: str, listing: str) -> dict[str, float]:
    """Returns the figures of a kernel from what ptxas says and from its instructions (SASS).

    Of the innermost loops with tensor-core products the longest counts: `loop` is all of it, `pass` the shortest way
    through it, that of a tile without a mask whose data is there.

    Args:
      report: "ptxas info" lines.
      listing: of nvdisasm.

    Raises:
      ValueError: they hold something else.
    """
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    used = re.findall(r"Used (\d+) registers", report)
    code = instructions(listing)
    count = collections.Counter(line.name for line in code)
    loops = {}  # a jump back from which there is no way to itself leads out of a wait that was moved to the end
    for end, line in enumerate(code):
        if line.target is not None and any(x.name == "HGMMA" for x in code[line.target : end]):
            loops[line.target, end] = shortest(code, line.target, end)
    loops = {where: steps for where, steps in loops.items() if steps is not None}
    inner = [a for a in loops if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in loops)]
    if len(memory) != 1 or len(used) != 1 or not inner:
        raise ValueError(f"no report and listing of one kernel with a loop of tensor-core products: {report[:300]!r}")
    stack, stores, loads = map(int, memory[0])
    return {
        "registers": int(used[0]),
        "stack": stack,
        "spill_stores": stores,
        "spill_loads": loads,
        "hgmma_percent": 100 * count["HGMMA"] / sum(count[x] for x in PRODUCTS),
        "atomics": sum(count[x] for x in ATOMICS),
        "loop": max(end + 1 - begin for begin, end in inner),
        "pass": max(loops[where] for where in inner),
        "code": len(code),
    }


def bundles(text: str) -> dict[str, float]:
    """Returns the figures of a kernel from the slots that every bundle of instructions uses.

    Raises:
      ValueError: the text is not what libtpu writes today.
    """
    head, _, body = text.partition("== UTILIZATION:")
    lines = [line for line in head.splitlines() if line.strip()]
    rows = [list(map(int, line.split())) for line in body.splitlines() if re.fullmatch(r"[\d ]*\d[\d ]*", line)]
    columns = [x.strip() for x in lines[1].split(",")] if len(lines) == 3 else []
    if not {"MXU", "VLOAD:FILL", "VSTORE:SPILL"} <= {*columns} or not rows or {*map(len, rows)} != {len(columns)}:
        raise ValueError(f"not a table of slots: {text[:300]!r}")
    capacity = dict(zip(columns, map(int, lines[2].split()), strict=True))
    used = {name: sum(row[i] for row in rows) for i, name in enumerate(columns)}
    share = 100 * used["MXU"] / (capacity["MXU"] * len(rows))
    return {
        "bundles": len(rows),
        "mxu_percent": round(share, 2),
        "spill_stores": used["VSTORE:SPILL"],
        "spill_loads": used["VLOAD:FILL"],
    }


def read(program: str, folder: Path) -> dict[str, dict[str, float]]:
    """Returns the figures of every kernel of a program by name.

    Raises:
      ValueError: a kernel has no machine code in the folder, or more than one.
    """
    chip, kernels, _ = PROGRAMS[program]
    out = {}
    for name, kernel in zip(names(program), kernels, strict=True):
        if chip == "h200":
            files = [[p.read_text() for p in folder.glob(end)] for end in ("*.ptxas", "*.sass_ctrl")]
        else:
            pattern = f"*-{program.split(maxsplit=1)[0]}_{kernel}.*final_hlo-static-per-bundle-utilization.txt"
            files = [[p.read_text() for p in folder.glob(pattern)]]
        if any(len(found) != 1 for found in files):
            raise ValueError(f"{name}: {[len(found) for found in files]} files of machine code, not one each")
        out[name] = (hopper if chip == "h200" else bundles)(*(found[0] for found in files))
    return out


def build(program: str) -> dict[str, dict[str, float]]:
    """Compiles a program and returns the figures of its kernels; the first use of JAX in this process."""
    chip, _, make = PROGRAMS[program]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(topology.ENVIRONMENT)
        if chip == "h200":
            os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_SASS_CTRL="1", MOSAIC_GPU_DUMP_TO=folder)
        else:  # of every stage of the compiler it would be a gigabyte
            stage = "--xla_jf_dump_llo_pass_label_regex=final_hlo.*"
            os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {stage}"
        import jax
        from jax.sharding import SingleDeviceSharding

        place = SingleDeviceSharding(topology.devices(topology.parse(CHIPS[chip]))[0])
        run, shapes = make()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        jax.jit(run).trace(*shapes).lower().compile()
        return read(program, Path(folder))


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1])))
