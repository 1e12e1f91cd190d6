"""Ahead of time, what is told: memory by name, floors, loops, exit status, topologies, committed results."""

import json
from pathlib import Path
from types import SimpleNamespace

import aot_test
import jax
import pytest
from jax.experimental import topologies

from experiments.aot import scaling
from jaxcl import main
from jaxcl.aot import __main__ as command
from jaxcl.aot import abstract, examine, hlo, show, topology
from jaxcl.schema import UserError

RESULTS = Path(__file__).parent.parent / "experiments" / "aot" / "results"


def test_every_part_of_the_memory_has_its_own_name():
    known = examine.memory(aot_test.stats(argument=10, output=9, alias=8, temp=4, generated_code=2, peak=3))
    assert known == {
        "arguments": 10, "outputs": 9, "aliased": 8, "temporaries": 4, "code": 2, "peak": 3, "needed": 17,
    }  # fmt: skip


def step_of(compile_):
    """A step as far as `examine` looks at it: eight chips of v5e."""
    device = SimpleNamespace(device_kind="TPU v5 lite")
    lowered = SimpleNamespace(lower=lambda: SimpleNamespace(compile=compile_))
    return SimpleNamespace(
        facts=lambda: {"flops_per_step": 3e15, "devices": 8, "mesh": {"data": 1, "fsdp": 8}},
        plan=SimpleNamespace(mesh=SimpleNamespace(devices=SimpleNamespace(flat=[device]))),
        run=SimpleNamespace(trace=lambda *x: lowered),
        state=[1, 2, 3],
        batch=None,
    )


def test_floors_are_the_peak_of_all_chips_and_the_bandwidth_of_each():
    chips = topology.parse("v5e:2x4")
    verdict = examine.Verdict(5.0, 16.0, {"memory_gib": {"arguments": 3.0, "outputs": 1.0, "temporaries": 9.0}}, 1.0)
    found = examine.floors(step_of(None), chips, verdict)
    assert found == pytest.approx({"compute_s": 3e15 / (8 * 197e12), "hbm_s": 4 * 2**30 / 0.819e12})
    assert examine.floors(step_of(None), chips, verdict._replace(details={})).keys() == {"compute_s"}


def test_collectives_send_what_a_ring_has_to_and_the_links_of_a_chip_set_a_floor():
    calls = {kind: {"bytes": 800} for kind in hlo.COLLECTIVES}
    alone = {kind: hlo.sent({kind: calls[kind]}, 8) for kind in calls}
    assert alone == {
        "all-gather": 700, "all-reduce": 1400, "reduce-scatter": 5600, "all-to-all": 700, "ragged-all-to-all": 700,
        "collective-permute": 800,
    }  # fmt: skip
    assert hlo.sent(calls, 8) == sum(alone.values())
    known = {"memory_gib": {"arguments": 3.0, "outputs": 1.0}, "collectives": {"all-reduce": {"bytes": 8e9}}}
    found = examine.floors(step_of(None), topology.parse("v5e:2x4"), examine.Verdict(5.0, 16.0, known, 1.0))
    assert found["links_s"] == pytest.approx(2 * 7 / 8 * 8e9 / 200e9)
    other = examine.floors(step_of(None), topology.parse("h200:8"), examine.Verdict(5.0, 16.0, known, 1.0))
    assert "links_s" not in other  # its links are not known here


def test_chips_have_what_their_vendors_say():
    sheets = {  # GiB, of which the compiler leaves the rest; GB/s of HBM; GB/s of all links, both directions together
        "v4": (32, 1200, None),
        "v5e": (16, 819, 400),
        "v5p": (95, 2765, 1200),
        "v6e": (32, 1640, 800),
        "tpu7x": (192 / 2, 7380 / 2, None),  # a chip is two devices
        "h200": (0.95 * 143771 / 1024, 4800, None),  # as nvidia-smi shows it
    }
    assert topology.CHIPS.keys() == sheets.keys()
    for kind, (size, bandwidth, links) in sheets.items():
        chip = topology.CHIPS[kind]
        assert chip.hbm == pytest.approx(size, rel=0.04)
        assert chip.bandwidth == pytest.approx(1e9 * bandwidth)
        assert chip.links == (links and 1e9 * links / 2)


def test_floors_bound_the_utilisation():
    whole = {"compute_s": 3.0, "hbm_s": 0.1, "links_s": 1.0}
    assert examine.bounds(whole, "none") == {"overlapped": 1.0, "in_turn": 0.75}
    assert examine.bounds(whole, "full") == {"overlapped": 0.75, "in_turn": 0.6}
    assert examine.bounds({**whole, "links_s": 12.0}, "full") == {"overlapped": 0.25, "in_turn": 0.1875}
    assert examine.bounds({**whole, "hbm_s": 30.0}, None)["overlapped"] == 0.1
    assert examine.bounds({"compute_s": 3.0, "hbm_s": 0.1}, "full") == {}


def test_the_closed_form_of_collectives_is_that_of_compiled_programs():
    for name in ("8b_v5e", "8b_v5p", "70b_v5p", "scaling/8b_v5p_64", "scaling/8b_v5e_64"):
        found = json.loads((RESULTS / f"{name}.json").read_text())
        model, kind, chips = (*Path(name).name.split("_"), "256")[:3]
        had = sum(one["bytes"] for one in found["collectives"].values())
        wanted = sum(one["bytes"] for one in scaling.formula(model, 1).values())
        assert had == pytest.approx(wanted, rel=0.04)
        made = scaling.figures(model, kind, int(chips), 256, 1, found["needed_gib"], found["collectives"])
        assert made["floors"]["compute_s"] == pytest.approx(found["floors"]["compute_s"], rel=1e-3)
        needed = scaling.memory(model, kind, int(chips), 256 // int(chips), 1)
        told = {"scaling/8b_v5p_64": 0.93, "scaling/8b_v5e_64": 0.71}.get(name, 1.0)  # in the README
        assert needed / found["needed_gib"] == pytest.approx(told, rel=0.02)


def test_the_table_of_scaling_is_that_of_its_parts():
    rows = json.loads((RESULTS / "scaling" / "table.json").read_text())
    assert [(r["model"], r["kind"], r["chips"]) for r in rows[:4]] == [("8b", "v5e", n) for n in (16, 64, 256, 1024)]
    for made in rows:
        assert made["mfu_bound"] == pytest.approx(examine.bounds(made["floors"], "full"))
        assert (made["needed_gib"] <= made["available_gib"]) == (made["how"] != "refused")
        assert made == json.loads(json.dumps(scaling.row(made["model"], made["kind"], made["chips"])))


def test_a_program_that_is_refused_for_its_size_has_a_verdict_and_any_other_refusal_is_an_error():
    def refuse(text):
        def compile_():
            raise RuntimeError(text)

        return step_of(compile_)

    chips = topology.parse("v5e:2x4")
    found = examine.examine(refuse("Used 40.00G of 15.75G hbm"), chips)
    assert (found.fits, found.needed, found.available, found.short) == (False, 40.0, 15.75, 24.25)
    with pytest.raises(examine.Failed, match="cannot be compiled, whatever the memory: Mosaic failed"):
        examine.examine(refuse("Mosaic failed"), chips)

    compiled = SimpleNamespace(
        as_text=lambda: aot_test.MODULE, memory_analysis=lambda: aot_test.stats(argument=9, temp=9)
    )
    found = examine.examine(step_of(lambda: compiled), chips)
    assert (found.fits, found.needed, found.available) == (False, 18, 15.75)
    assert found.details["donation"] == {"state_leaves": 3, "aliased_inputs": 2}
    assert found.details["pallas"] == {"attention_forward": 24}


BRANCHES = """\
HloModule jit_run

%inner (s: s32[]) -> s32[] {
  ROOT %r = f32[4]{0} all-reduce(%x), to_apply=%add
}

%outer (s: s32[]) -> s32[] {
  %w = s32[] while(%i), condition=%unknown, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %again = s32[] while(%w), condition=%unknown, body=%inner
}

%yes (s: s32[]) -> s32[] {
  ROOT %p = bf16[2,2]{1,0} all-to-all(%x)
}

%no (s: s32[]) -> s32[] {
  ROOT %q = pred[8]{0} collective-permute(%x)
}

%never (s: s32[]) -> s32[] {
  ROOT %z = pred[8]{0} all-gather(%x)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = s32[] while(%i), condition=%unknown, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %c = s32[] conditional(%k, %a, %b), branch_computations={%yes, %no}
}
"""


def test_loops_in_loops_and_branches_are_counted():
    assert hlo.read(BRANCHES)["collectives"] == {
        "all-reduce": {"sites": 1, "times": 5 * (3 + 1), "bytes": 5 * (3 + 1) * 16},
        "all-to-all": {"sites": 1, "times": 1, "bytes": 8},
        "collective-permute": {"sites": 1, "times": 1, "bytes": 8},
    }


PROGRAM = {
    "memory_gib": examine.memory(aot_test.stats(argument=10, output=9, alias=9, temp=2)),
    "collectives": {"all-gather": {"sites": 2, "times": 25, "bytes": 2**30}},
    "pallas": {"attention_forward": 24},
    "donation": {"state_leaves": 3, "aliased_inputs": 3},
}


def test_the_table_says_what_is_left_and_what_is_not_donated():
    result = {**aot_test.RESULT, **PROGRAM, "needed_gib": 12.0, "available_gib": 16.0, "fits": True}
    text = "\n".join(show.table(result))
    assert "fits: 12.00 GiB of 16.00 GiB (75%), 4.00 GiB free" in text
    assert "the whole state: 3 of 3 arrays" in text
    assert "NOT" not in text
    assert "25 a step at 2 places, 1.00 GiB" in text
    assert "attention_forward x 24" in text
    short = show.table(result | {"donation": {"state_leaves": 3, "aliased_inputs": 2}})
    assert any("NOT the whole state: 2 of 3 arrays" in line for line in short)
    tried = {"name": "remat", "flags": "--x", "fits": False, "needed_gib": 20.0, "available_gib": 16.0}
    assert "4.00 GiB short" in show.knob(tried)
    assert "-4" not in show.knob(tried)


class Narrow(aot_test.Fake):
    """A session that needs one row at a time and bfloat16; full rematerialisation cannot be compiled by itself."""

    def compile(self, config):
        narrow = config["model"]["compute_dtype"] == "bfloat16"
        if config["model"]["remat"] == "full" and not narrow:
            raise UserError("no such remat")
        need = (1 if narrow else 2) * (3.0 if config["stream"]["batch"] // 8 == config.get("microbatches", 1) else 4.0)
        return {**aot_test.RESULT, "needed_gib": need, "available_gib": 3.5, "fits": need <= 3.5}


def test_changes_are_tried_together_until_they_are_enough(capsys):
    session = Narrow(topology.parse("v5e:2x4"), jax.devices(), "c", [])
    found = session.report(aot_test.config(), quick=False)
    tried = {knob["name"]: knob.get("fits") for knob in found["knobs"]}
    assert list(tried)[-1] == "remat + fsdp + microbatches + bfloat16"  # and not shorter rows as well
    assert [name for name, fits in tried.items() if fits] == list(tried)[-1:]
    assert found["knobs"][0]["failed"] == "no such remat"
    out = capsys.readouterr().out
    assert "fails: no such remat" in out
    assert "none of these is enough" not in out


def test_the_facts_of_a_step_are_those_of_its_config():
    rows = aot_test.config()["stream"] | {"batch": 16}
    config = aot_test.config(stream=rows, microbatches=2, tokenizer={"name": "hf", "path": "/no"})
    plain = abstract.make(config, jax.devices()).facts()
    wanted = {"rows_per_step": 16, "length": 256, "microbatches": 2, "tokens_per_step": 16 * 256, "devices": 8}
    assert {key: plain[key] for key in wanted} == wanted
    assert plain["mesh"] == {"data": 4, "fsdp": 2}
    cut = abstract.make(config | {"adapter": "lora"}, jax.devices()).facts()
    assert cut["trained_parameters"] < plain["trained_parameters"] == plain["parameters"]
    assert cut["flops_per_step"] < plain["flops_per_step"]  # frozen matrices have no gradient


def test_a_search_tries_only_what_the_rows_can_be_cut_into(capsys):
    session = aot_test.Fake(topology.parse("v5e:2x4"), jax.devices(), "c", [])
    found = session.search(aot_test.config(microbatches=2), "batch")["search"]
    assert found["best"] == 32
    assert not [batch for batch in found["needed_gib"] if batch % (8 * 2)]  # shards x microbatches
    rows = aot_test.config()["stream"] | {"batch": 96}
    found = session.search(aot_test.config(stream=rows), "microbatches")["search"]
    assert found["best"] == 6
    assert not [passes for passes in found["needed_gib"] if 96 // 8 % passes]


@pytest.mark.parametrize(("text", "options"), [
    ("v4:2x2x4", {"platform": "tpu", "topology_name": "v4:2x2x4", "chip_config_name": "megacore"}),
    ("v5p:8x8x4", {"platform": "tpu", "topology_name": "v5p:8x8x4"}),
    ("v5e:1x1", {"platform": "tpu", "topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}),
    ("h200:32", {"platform": "cuda", "topology": "1x4x8"}),
    ("h200:4", {"platform": "cuda", "topology": "1x1x4"}),
])  # fmt: skip
def test_the_compiler_is_asked_for_the_machine_that_was_named(text, options, monkeypatch):
    asked = {}

    def describe(**given):
        asked.update(given)
        return SimpleNamespace(devices=[1])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    monkeypatch.setattr(topology, "_installed", lambda module: True)
    assert topology.devices(topology.parse(text)) == [1]
    target = asked.pop("target_config", "")
    assert asked == options
    assert ("major: 9" in target) == (options["platform"] == "cuda")


@pytest.mark.parametrize(("batch", "status"), [(16, 0), (64, 1)])
def test_the_exit_status_says_whether_it_fits(batch, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(topology, "ENVIRONMENT", {})
    monkeypatch.setattr(topology, "devices", lambda target: jax.devices())
    monkeypatch.setattr(main, "read", lambda argv, usage: ({}, None))
    wanted = aot_test.config()["stream"] | {"batch": batch}
    monkeypatch.setattr(abstract, "one_run", lambda config, variant: (aot_test.config(stream=wanted), []))
    monkeypatch.setattr(command, "Session", aot_test.Fake)
    out = tmp_path / "a.json"
    with pytest.raises(SystemExit) as error:
        command.main(["--topology=v5e:2x4", "--config=configs/pod.py", f"--out={out}"])
    assert error.value.code == status
    assert json.loads(out.read_text())["fits"] == (status == 0)
    assert ("short" in capsys.readouterr().out) == (status == 1)


PROGRAMS = sorted([*RESULTS.glob("*.json"), *RESULTS.glob("scaling/*_*.json"), *RESULTS.glob("slices/*.json")])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_committed_results_are_whole_and_of_the_chips_as_they_are_known(path):
    found = json.loads(path.read_text())
    chip = topology.parse(found["topology"]).chip
    assert found["available_gib"] == pytest.approx(chip.hbm, abs=0.01)
    assert found["fits"] == ("memory_gib" in found and found["needed_gib"] <= found["available_gib"])
    assert found["versions"].keys() >= {"jax", "jaxlib"}
    told = floors_of(found)
    assert {name: told[name] for name in found["floors"]} == pytest.approx(found["floors"])
    assert told.keys() - found["floors"] <= {"links_s"}  # those of before had none
    if not found["fits"]:
        assert found["needed_gib"] > found["available_gib"]
        tried = {"remat"} if path.parent == RESULTS else set()  # elsewhere it is full already
        assert {knob["name"] for knob in found["knobs"]} >= {"microbatches", "length"} | tried
        return
    assert examine.memory(bytes_of(found["memory_gib"]))["needed"] == pytest.approx(found["needed_gib"])
    assert found["donation"]["aliased_inputs"] == found["donation"]["state_leaves"]
    assert found["floors"]["compute_s"] > 0
    if "mfu_bound" in found:
        remat = "none" if path.parent.name == "slices" else "full"
        assert found["mfu_bound"] == pytest.approx(examine.bounds(found["floors"], remat))
    if path.parent == RESULTS:
        assert found["pallas"] == kernels_of(path.stem, found)
    elif path.parent.name == "scaling":
        each = {name: times / found["microbatches"] for name, times in found["pallas"].items()}
        assert each == pytest.approx(kernels_of(path.stem, found), abs=1)  # of four slices one layer is taken twice


def floors_of(found):
    """Returns the floors of a program as they are computed now."""
    step = step_of(None)
    step.facts = lambda: found
    step.plan.mesh.devices.flat[0].device_kind = found["device"]
    known = {name: found[name] for name in ("memory_gib", "collectives") if name in found}
    chips = topology.parse(found["topology"], found.get("slices", 1))
    return examine.floors(step, chips, examine.Verdict(found["needed_gib"], found["available_gib"], known, 0.0))


def kernels_of(name, found):
    """Returns the Pallas calls that a program has to have, with full rematerialisation."""
    layers = {"1b": 16, "8b": 32, "70b": 80, "search": 12}[name.split("_")[0]]
    if name.endswith("_plain"):
        return found["pallas"]
    if found["topology"].startswith("h200"):
        assert bool(found["no_kernel"]) == ("kernel" not in name)
        return {"mpmd_map": 4 * layers} if "kernel" in name else {}  # the name of every Mosaic GPU kernel
    attention = {"attention_forward": 2 * layers, "attention_d_queries": layers, "attention_d_keys": layers}
    if name == "70b_v5p" or name.endswith("_blocks"):  # compiled before the vocabulary's kernels were cut over a mesh
        return attention
    return attention | {f"vocabulary_{part}": 1 for part in ("cross_entropy", "d_hidden", "d_head")}


def bytes_of(known):
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    return aot_test.stats(generated_code=known["code"], peak=known["peak"], **{v: known[k] for k, v in names.items()})
