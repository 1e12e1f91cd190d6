"""Scaling on paper: memory, communication and the bound on utilisation of the 8 B and 70 B steps on 16 to 1,024 chips.

python -m experiments.aot.scaling [--compile]     prints the table and writes results/scaling/table.json

A row is `compiled` if results/scaling has its program (--compile makes those of COMPILED, minutes of a core each), or
if results/ does; `refused` if the compiler found that it does not fit: its memory is the compiler's, the rest computed.
All others are computed by the closed form below, which the compiled ones check.

Closed form, for parameters cut over N chips (fsdp), M passes a step, full rematerialisation, bfloat16 compute:
    gathered   M (2 layers + head) 2 bytes      forward and again in the backward pass; the head once
    summed     M (layers + head + table) 2 bytes       the gradient of every parameter
    memory     12 P/N (parameters, two moments in float32) + 4 P/N (gradient) + rows x layers x L x D x 2 bytes (what
               full rematerialisation keeps) + what a compiled program of that chip had besides, at 256 chips
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from jaxcl import flops
from jaxcl.aot import examine, hlo, topology
from jaxcl.models import presets

RESULTS = Path(__file__).parent / "results"
PLACE = RESULTS / "scaling"
LENGTH = 4096
# chips -> sizes of the torus; 1,024 chips of v5e are four slices of 256, which the data centre's network joins.
TORI = {
    "v5e": {16: "4x4", 64: "8x8", 256: "16x16", 1024: "16x16"},
    "v5p": {16: "2x2x4", 64: "4x4x4", 256: "8x8x4", 1024: "8x8x16"},
}
DEVICES = {"v5e": "TPU v5e", "v5p": "TPU v5"}
PRESETS = {"8b": "llama3-8b", "70b": "llama3-70b"}
# Bytes a second of a chip to other slices: 6.4 Tbps for a pod of 256 chips (https://cloud.google.com/tpu/docs/v5e).
BETWEEN_SLICES = 6.4e12 / 8 / 256
MOST_ROWS = 4  # of a chip and pass: what a layer needs besides is known for one row, and grows with them
COMPILED = (
    *(("8b", kind, chips) for chips in (16, 64, 1024) for kind in ("v5p", "v5e")),
    *(("70b", "v5p", chips) for chips in (16, 64, 1024)),
)
HEAD = (
    "| model, chips | how | rows a step, passes | GiB needed of | gathered + summed, GiB | sent, GiB | arithmetic, ms "
    "| links, ms | bound: hidden | bound: in turn |"
)


def sizes(model):
    """Returns layers, embed, and the parameters of all layers, of the head and of the table."""
    shape = presets.PRESETS[PRESETS[model]]
    vocab, layers, embed, heads, kv_heads, head, mlp = (
        shape[key] for key in ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp")
    )
    attention = embed * head * (2 * heads + 2 * kv_heads)
    one = attention + 3 * embed * mlp + 2 * embed
    return layers, embed, layers * one, vocab * embed, vocab * embed


def formula(model, passes):
    """Returns collectives as `jaxcl.aot.hlo.read` does, in bytes of results for a chip and step."""
    _, _, layers, head, table = sizes(model)
    gathered, summed = passes * 2 * (2 * layers + head), passes * 2 * (layers + head + table)
    return {"all-gather": {"bytes": gathered}, "all-reduce": {"bytes": summed}}


def reference(model, kind):
    """Returns the compiled step of 256 chips; of 70 B only that of v5p."""
    return json.loads((RESULTS / f"{model}_{kind}.json").read_text())


def memory(model, kind, shards, rows, passes):
    """Returns GiB for each chip, `rows` of them in a pass."""
    layers, embed, *parts = sizes(model)
    whole = sum(parts)
    known = reference(model, kind)["memory_gib"]
    kept = layers * LENGTH * embed * 2  # of a row
    besides = known["temporaries"] + known["code"] - (kept + 4 * whole / 256) / examine.GIB
    return ((12 + 4) * whole / shards + rows * kept) / examine.GIB + besides


def computed(model, kind, chips):
    """Returns a row by the closed form; the fewest passes that fit."""
    chip = topology.CHIPS[kind]
    shards = min(chips, 256) if kind == "v5e" else chips
    rows = max(256, chips)
    for passes in (1, 2, 4, 8, 16):
        each = rows // chips // passes
        if each < 1:
            continue
        needed = memory(model, kind, shards, each, passes)
        if needed <= chip.hbm and each <= MOST_ROWS:
            break
    calls = formula(model, passes)
    return figures(model, kind, chips, rows, passes, needed, calls) | {"how": "computed"}


def figures(model, kind, chips, rows, passes, needed, calls):
    """Returns a row of the table."""
    chip, shards = topology.CHIPS[kind], min(chips, 256) if kind == "v5e" else chips
    layers, _, body, head, _ = sizes(model)
    shape = presets.PRESETS[PRESETS[model]]
    cost = flops.per_token(body + head, layers, LENGTH, shape["heads"] * shape["head_dim"])
    sent = hlo.sent(calls, shards)
    links = sent / chip.links
    if chips > shards:  # the sum over the slices of each chip's part of the gradient
        slices = chips // shards
        links += 2 * (slices - 1) / slices * (calls["all-reduce"]["bytes"] / passes / shards) / BETWEEN_SLICES
    floors = {
        "compute_s": cost * rows * LENGTH / (chips * flops.peak(DEVICES[kind])),
        "hbm_s": 2 * 12 * sum(sizes(model)[2:]) / shards / chip.bandwidth,
        "links_s": links,
    }
    return {
        "model": model,
        "kind": kind,
        "chips": chips,
        "rows_per_step": rows,
        "passes": passes,
        "needed_gib": needed,
        "available_gib": chip.hbm,
        "collectives_gib": {name: one["bytes"] / examine.GIB for name, one in calls.items()},
        "sent_gib": sent / examine.GIB,
        "floors": floors,
        "mfu_bound": examine.bounds(floors, "full"),
    }


def path_of(model, kind, chips):
    """Returns where the compiled program of a row is, if there is one."""
    return RESULTS / f"{model}_{kind}.json" if chips == 256 else PLACE / f"{model}_{kind}_{chips}.json"


def row(model, kind, chips):
    """Returns the figures of one model on so many chips."""
    path = path_of(model, kind, chips)
    if not path.exists():
        return computed(model, kind, chips)
    found = json.loads(path.read_text())
    if not found["fits"]:
        return computed(model, kind, chips) | {"how": "refused", "needed_gib": found["needed_gib"]}
    passes, rows = found["microbatches"], found["rows_per_step"]
    made = figures(model, kind, chips, rows, passes, found["needed_gib"], found["collectives"])
    wanted = sum(one["bytes"] for one in formula(model, passes).values())
    had = sum(one["bytes"] for one in found["collectives"].values())
    return made | {"how": "compiled", "bytes_over_formula": had / wanted}


def line(made):
    """Returns a row as text."""
    parts = " + ".join(f"{value:,.1f}" for name, value in made["collectives_gib"].items() if value > 0.5)
    floors, bound = made["floors"], made["mfu_bound"]
    fits = "" if made["needed_gib"] <= made["available_gib"] else " **does not fit**"
    done = floors["compute_s"] * 4 / 3
    cells = (
        f"{made['model']}, {made['chips']:,} {made['kind']}",
        made["how"],
        f"{made['rows_per_step']:,}, {made['passes']}",
        f"{made['needed_gib']:.1f} of {made['available_gib']:.1f}{fits}",
        parts,
        f"{made['sent_gib']:,.1f}",
        f"{done * 1e3:,.0f}",
        f"{floors['links_s'] * 1e3:,.0f}",
        f"{bound['overlapped']:.0%}",
        f"{bound['in_turn']:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def compile_all():
    """Compiles what is not there yet."""
    PLACE.mkdir(exist_ok=True)
    for model, kind, chips in COMPILED:
        path = path_of(model, kind, chips)
        if path.exists():
            continue
        passes = computed(model, kind, chips)["passes"]
        flags = [f"--topology={kind}:{TORI[kind][chips]}", f"--config=configs/pod.py:{model}", "--quick"]
        flags += [f"--config.stream.batch={max(256, chips)}", f"--config.microbatches={passes}", f"--out={path}"]
        if kind == "v5e" and chips > 256:
            flags += [f"--slices={chips // 256}", f"--config.mesh.replica={chips // 256}"]
        subprocess.run([sys.executable, "-m", "jaxcl.aot", *flags], check=False)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    if parser.parse_args().compile:
        compile_all()
    rows = [row("8b", kind, chips) for kind in TORI for chips in TORI[kind]]
    rows += [row("70b", "v5p", chips) for chips in TORI["v5p"]]
    PLACE.mkdir(exist_ok=True)
    (PLACE / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join([HEAD, "|---" * (HEAD.count(" | ") + 1) + "|", *map(line, rows)]))
    checked = [made["bytes_over_formula"] for made in rows if "bytes_over_formula" in made]
    spread = f"{min(checked):.2f} to {max(checked):.2f}, geometric mean {math.prod(checked) ** (1 / len(checked)):.2f}"
    print(f"\nbytes of collectives, compiled over closed form: {spread} ({len(checked)} programs)")


if __name__ == "__main__":
    main()
