"""Ahead of time for several TPU slices: how they are asked for, what crosses the network between them, what is told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aot_test
import pytest
import slices_test
from aot_report_test import step_of
from jax.experimental import topologies

from jaxcl.aot import __main__ as command
from jaxcl.aot import examine, hlo, knobs, show, topology
from jaxcl.schema import UserError

RESULT = Path(__file__).parent.parent / "experiments" / "aot" / "results" / "slices" / "quickstart_v5e.json"


@pytest.mark.parametrize(
    ("text", "slices", "words"),
    [
        ("v5e:4x4", 0, "--slices=0: must be at least 1"),
        ("v5p:2x2x4", -2, "--slices=-2: must be at least 1"),
        ("h200:8", 2, "--slices=2: GPUs lie in hosts, .* --topology=h200:16"),
    ],
)
def test_numbers_of_slices_that_cannot_be_are_refused(text, slices, words):
    with pytest.raises(UserError, match=words):
        topology.parse(text, slices)


def test_the_compiler_is_asked_for_slices_and_has_to_know_them(monkeypatch):
    asked = {}

    def describe(**given):
        asked.update(given)
        return SimpleNamespace(devices=slices_test.devices("tpu", (4,) * known))

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    monkeypatch.setattr(topology, "_installed", lambda module: True)
    known = 3
    assert len(topology.devices(topology.parse("v5e:2x2", 3))) == 12
    assert asked == {"platform": "tpu", "topology_name": "v5e:2x2", "num_slices": 3}
    known = 1  # what it is asked for is passed over by one that does not know it
    with pytest.raises(UserError, match=r"--slices=3: this libtpu knows 1 of them; install a newer one.*\[aot\]"):
        topology.devices(topology.parse("v5e:2x2", 3))


def test_a_compiler_that_refuses_slices_is_one_line(monkeypatch):
    def refuse(**given):
        raise TypeError("unknown option\nnum_slices")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(topology, "_installed", lambda module: True)
    words = r"--topology=v5e:2x2 --slices=2: the compiler refuses it \(unknown option num_slices\)"
    with pytest.raises(UserError, match=words):
        topology.devices(topology.parse("v5e:2x2", 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the loader of ml_collections
def test_a_mesh_whose_replicas_do_not_cover_the_slices_is_refused(monkeypatch):
    monkeypatch.chdir(aot_test.ROOT)
    monkeypatch.setattr(topology, "ENVIRONMENT", {})
    found = slices_test.devices("tpu", (4, 4), "TPU v5 lite")
    monkeypatch.setattr(topology, "devices", lambda target: found[: 4 * target.slices])
    flags = ["--topology=v5e:2x2", "--slices=2", "--config=configs/quickstart.py"]
    with pytest.raises(UserError, match=r"config\.mesh\.replica=1: the devices lie in 2 slices.*replica=2"):
        command.main([*flags, "--config.mesh.data=8"])


TRANSFER = (
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
)
MODULE = f"""\
HloModule jit_run

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %inside.1 = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add
  %send.1 = (f32[6,8]{{1,0}}, u32[], token[]) send(%inside.1, %t), channel_id=2, is_host_transfer=true, {TRANSFER}
  %recv.1 = (f32[6,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=3, is_host_transfer=true, {TRANSFER}
  %done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true, {TRANSFER}
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %w = s32[] while(%i), condition=%unknown, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %send.2 = (bf16[7]{{0}}, u32[], token[]) send(%a, %t), channel_id=4, is_host_transfer=true, {TRANSFER}
  %send.3 = (f32[9]{{0}}, u32[], token[]) send(%a, %t), channel_id=5, is_host_transfer=true
  ROOT %r = f32[8]{{0}} copy(%a)
}}
"""


def test_what_leaves_a_slice_is_read_apart_from_what_stays_inside():
    found = hlo.read(MODULE)
    assert found["collectives"] == {"all-reduce": {"sites": 1, "times": 5, "bytes": 5 * 32}}
    assert found["between_slices"] == {"all-reduce": {"sites": 2, "times": 6, "bytes": 5 * 6 * 8 * 4 + 14}}
    assert hlo.read(aot_test.MODULE)["between_slices"] == {}


def test_the_floor_of_the_links_is_that_of_one_slice():
    step: Any = step_of(None)
    facts = step.facts() | {"mesh": {"replica": 2, "fsdp": 4}}
    step.facts = lambda: facts
    known = {"memory_gib": {"arguments": 3.0, "outputs": 1.0}, "collectives": {"all-reduce": {"bytes": 8e9}}}
    verdict = examine.Verdict(5.0, 16.0, known, 1.0)
    two = examine.floors(step, topology.parse("v5e:2x2", 2), verdict)["links_s"]
    assert two == pytest.approx(2 * 3 / 4 * 8e9 / 200e9)  # of four devices, and of two if replicas were inside
    assert examine.floors(step, topology.parse("v5e:2x4"), verdict)["links_s"] == pytest.approx(2 / 2 * 8e9 / 200e9)


def test_what_would_help_leaves_the_replicas_across_the_slices():
    made = {"mesh": {"replica": 4, "data": 2}, "stream": aot_test.config()["stream"]}
    found = {knob.name: knob for knob in knobs.single(aot_test.config(**made), made["mesh"], 2)}
    assert found["fsdp"].config["mesh"] == {"replica": 2, "data": 1, "fsdp": 4}
    whole = {"replica": 2, "fsdp": 4}
    assert "fsdp" not in {knob.name for knob in knobs.single(aot_test.config(mesh=whole), whole, 2)}
    assert "--config.mesh.replica=2" in knobs.together(aot_test.config(**made), made["mesh"], 2)[0].flags


def test_the_recorded_step_sends_its_gradients_and_nothing_else_to_the_other_slice():
    found = json.loads(RESULT.read_text())
    gradients_only(found)
    text = "\n".join(show.table(found))
    assert "on v5e:2x2, 2 slices: 8 x TPU v5 lite" in text
    assert "between slices  all-reduce, 28 a step at 13 places, 2.0 MiB from each device" in text


def gradients_only(found):
    """Each gradient crosses once, cut over the four chips of a slice or over the two of `fsdp`, padded to tiles."""
    assert (found["slices"], found["devices"], found["mesh"]) == (2, 8, {"replica": 2, "data": 2, "fsdp": 2})
    assert found["between_slices"].keys() == {"all-reduce"}
    whole = 4 * found["trained_parameters"]  # bytes of the gradient in float32
    assert whole / 4 <= found["between_slices"]["all-reduce"]["bytes"] <= 0.6 * whole
    assert found["collectives"]["all-gather"]["times"] >= 1  # of parameters, inside a slice


@pytest.mark.skipif(not topology._installed("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_a_step_is_compiled_for_two_slices_that_are_not_here(tmp_path):
    mesh = [f"--config.mesh.{axis}=2" for axis in ("replica", "data", "fsdp")]
    run = aot_test.call(
        *("--topology=v5e:2x2", "--slices=2", "--config=configs/quickstart.py", *mesh),
        *("--config.model.layers=1", f"--out={tmp_path / 'a.json'}"),
    )
    assert run.returncode == 0, run.stderr
    gradients_only(json.loads((tmp_path / "a.json").read_text()))
