"""Ahead of time: topologies, sizes, refusals, knobs and searches without a compiler; one small compilation with one."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxcl import flops, main, program, train
from jaxcl.aot import __main__ as command
from jaxcl.aot import abstract, examine, hlo, knobs, topology
from jaxcl.data import tokenizer
from jaxcl.schema import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "kind", "sizes", "platform"),
    [
        ("v5p:8x8x4", "v5p", (8, 8, 4), "tpu"),
        ("v5e:16x16", "v5e", (16, 16), "tpu"),
        ("TPU7x:2x2x1", "tpu7x", (2, 2, 1), "tpu"),
        ("h200:32", "h200", (32,), "cuda"),
    ],
)
def test_topologies_are_read(text, kind, sizes, platform):
    found = topology.parse(text)
    assert (found.kind, found.sizes, found.platform) == (kind, sizes, platform)


@pytest.mark.parametrize("text", ["", "v5p", "v5p:", "v5p:8x8", "v5e:16", "v5p:8x0x4", "v5p:8*8*4", "h200:12", "h20:8"])
def test_malformed_topologies_are_refused_with_examples(text):
    with pytest.raises(UserError, match=r"--topology=.*examples: v4:2x2x4.*h200:32") as error:
        topology.parse(text)
    assert "\n" not in str(error.value)


def test_a_missing_compiler_is_one_line_and_names_the_extra(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(topology, "_installed", lambda module: False)
    for text in ("v5e:2x2", "h200:8"):
        with pytest.raises(UserError, match=r"pip install -e '\.\[aot\]'"):
            topology.devices(topology.parse(text))


def test_every_chip_has_a_peak():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
    for kind in topology.CHIPS:
        assert flops.peak(SimpleNamespace(device_kind=kinds.get(kind, "NVIDIA H200")))
    assert flops.peak(SimpleNamespace(device_kind="TPU7x")) == 2307e12 / 2


def stats(**sizes):
    names = ("argument", "output", "alias", "temp", "generated_code")
    known = {f"{name}_size_in_bytes": sizes.get(name, 0) * 2**30 for name in names}
    return SimpleNamespace(**known, peak_memory_in_bytes=sizes.get("peak", 0) * 2**30)


def test_memory_counts_donated_buffers_once():
    known = examine.memory(stats(argument=10, output=9, alias=8, temp=4, generated_code=1))
    assert known["needed"] == 10 + 9 - 8 + 4 + 1
    assert examine.memory(stats(argument=10, output=9, alias=8, peak=20, generated_code=1))["needed"] == 21


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (61.39G) exceeds "
         "available HBM (15.75G).", (61.39, 15.75)),
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.0M of 0.25G hbm. Exceeded "
         "hbm capacity by 256.0M.", (0.5, 0.25)),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 140.00M of 128.00M vmem.", None),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)  # fmt: skip
def test_refusals_of_the_compiler_are_read(message, sizes):
    assert examine.refusal(message) == sizes


def test_a_verdict_knows_what_is_missing():
    assert examine.Verdict(10.0, 16.0, {"memory_gib": {}}, 1.0).fits
    refused = examine.Verdict(61.0, 16.0, {}, 1.0)
    assert (refused.fits, refused.short) == (False, 45.0)
    assert not examine.Verdict(17.0, 16.0, {"memory_gib": {}}, 1.0).fits


MODULE = """\
HloModule jit_run, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (3, {}, may-alias) }, \
entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%gather (p: bf16[1,8]) -> bf16[16,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %all-gather.7 = bf16[16,8]{1,0:T(8,128)} all-gather(%p), channel_id=5, dimensions={0}
}

%body (s: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {
  %f.1 = bf16[16,8]{1,0} fusion(%x), kind=kLoop, calls=%gather
  %f.2 = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%gather.clone
  %f.3 = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%meanwhile
  %attention_forward.3 = (f32[4]{0}, f32[4]{0}) custom-call(%f.1), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], bf16[1,8]) tuple(%i, %x)
}

%gather.clone (p: bf16[1,8]) -> bf16[16,8] {
  ROOT %all-gather.8 = bf16[16,8]{1,0:T(8,128)} all-gather(%p), channel_id=5, dimensions={0}
}

%meanwhile (p: bf16[1,8]) -> bf16[4,8] {
  ROOT %all-gather.9 = bf16[4,8]{1,0:T(8,128)} all-gather(%p), channel_id=6, dimensions={0}
}

%start (p: bf16[1,8]) -> bf16[4,8] {
  ROOT %all-gather.10 = bf16[4,8]{1,0:T(8,128)} all-gather(%p), channel_id=6, dimensions={0}
}

%condition (s: (s32[], bf16[1,8])) -> pred[] {
  %c = s32[]{:T(128)} constant(24)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %f.4 = bf16[4,8]{1,0} fusion(%a), kind=kCustom, calls=%start
  %while.1 = (s32[]{:T(128)}, bf16[1,8]{1,0}) while(%t), condition=%condition, body=%body
  %r = (f32[10]{0}, f32[6]{0}) all-reduce(%a, %b), channel_id=9, to_apply=%add
  %g = (f32[2]{0}, f32[32]{0}) all-gather-start(%a), channel_id=11
  ROOT %out = f32[8]{0} custom-call(%g), custom_call_target="ConcatBitcast"
}
"""


def test_loops_multiply_what_is_in_them_and_one_channel_counts_once():
    found = hlo.read(MODULE)
    assert found["collectives"] == {
        "all-gather": {"sites": 3, "times": 26, "bytes": 24 * 16 * 8 * 2 + 4 * 8 * 2 + 32 * 4},
        "all-reduce": {"sites": 1, "times": 1, "bytes": 64},
    }
    assert found["pallas"] == {"attention_forward": 24}
    assert found["custom_calls"] == {"ConcatBitcast": 1}
    assert found["aliased"] == 2


def config(**changes):
    base = main.plain(importlib.import_module("configs.pod").get_config())
    base["model"] |= {"preset": "tiny", "vocab": 264, "remat": "none", "compute_dtype": "float32"}
    base["packing"], base["tokenizer"] = {"length": 256}, {"name": "byte"}
    return base | {"mesh": {"data": 4, "fsdp": 2}, "stream": base["stream"] | {"batch": 32}} | changes


def test_knobs_are_changes_of_the_config():
    found = {knob.name: knob for knob in knobs.single(config(), {"data": 4, "fsdp": 2})}
    assert list(found) == ["remat", "fsdp", "microbatches", "bfloat16", "length"]
    assert found["fsdp"].config["mesh"] == {"data": 1, "fsdp": 8, "replica": 1}
    assert found["microbatches"].flags == "--config.microbatches=4"
    assert found["length"].config["packing"]["length"] == 128
    assert config() == config()  # the original is not touched
    assert found["remat"].config["model"]["preset"] == "tiny"
    both = knobs.together(config(), {"data": 4, "fsdp": 2})
    assert [knob.name for knob in both] == [
        "remat + fsdp + microbatches + bfloat16",
        "remat + fsdp + microbatches + bfloat16 + length",
    ]
    assert both[1].config["microbatches"] == 4
    assert both[1].config["packing"]["length"] == 128


def test_knobs_leave_room_for_the_experts():
    mesh = {"data": 4, "expert": 2}
    found = {knob.name: knob for knob in knobs.single(config(mesh=mesh), mesh)}
    assert found["fsdp"].config["mesh"] == {"replica": 1, "data": 1, "fsdp": 4, "expert": 2}
    assert "fsdp" not in {knob.name for knob in knobs.single(config(), {"fsdp": 4, "expert": 2})}


def test_knobs_that_are_turned_already_are_left_out():
    small = config(microbatches=32, packing={"length": 100})
    small["model"] |= {"remat": "full", "compute_dtype": "bfloat16"}
    assert knobs.single(small, {"fsdp": 8}) == []
    assert knobs.together(small, {"fsdp": 8}) == []


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 31, 32, 100])
@pytest.mark.parametrize("start", [1, 5, 64])
def test_the_search_finds_the_largest_that_fits(limit, start):
    asked = []

    def share(number):
        asked.append(number)
        return number / limit if limit else 2.0

    assert knobs.largest(share, start) in range(limit - limit // 16, limit + 1)
    assert len(asked) == len(set(asked)) <= 10


def test_the_search_finds_the_fewest_passes():
    choices = knobs.divisors(24)
    assert choices == [1, 2, 3, 4, 6, 8, 12, 24]
    for limit in choices:
        assert knobs.fewest(lambda n, limit=limit: n >= limit, choices) == limit
    assert knobs.fewest(lambda n: False, choices) is None
    with pytest.raises(UserError, match="still fits"):
        knobs.largest(lambda n: 0.9, 1)


class Fake(command.Session):
    """A session whose compiler needs a GiB for every row that a device holds at a time, and two in float32."""

    def compile(self, config):
        rows = config["stream"]["batch"] / 8 / config.get("microbatches", 1)
        need = rows * (1 if config["model"]["compute_dtype"] == "bfloat16" else 2)
        return {**RESULT, "needed_gib": need, "available_gib": 4.0, "fits": need <= 4.0}


RESULT = {
    "config": "c", "topology": "v5e:2x4", "device": "TPU v5 lite", "parameters": 10, "trained_parameters": 10,
    "mesh": {"data": 4, "fsdp": 2}, "devices": 8, "rows_per_step": 32, "length": 256, "microbatches": 1,
    "tokens_per_step": 8192, "flops_per_step": 10, "floors": {}, "notes": [], "seconds": 1.0,
}  # fmt: skip


@pytest.fixture
def session():
    return Fake(topology.parse("v5e:2x4"), jax.devices(), "c", [])


def test_what_does_not_fit_is_told_what_would_help(session, capsys):
    found = session.report(config(stream=config()["stream"] | {"batch": 64}), quick=False)
    out = capsys.readouterr().out
    assert "does not fit: needs 16.00 GiB on each device, has 4.00 GiB, 12.00 GiB short" in out
    fitting = {knob["name"]: knob["fits"] for knob in found["knobs"]}
    assert fitting == {"remat": False, "fsdp": False, "microbatches": True, "bfloat16": False, "length": False}
    assert "fits, 2.00 GiB free  --config.microbatches=8" in out
    quick = session.report(config(stream=config()["stream"] | {"batch": 64}), quick=True)
    assert all("fits" not in knob for knob in quick["knobs"])


def test_search_ends_with_the_flag_to_set(session, capsys):
    assert session.search(config(), "batch")["search"]["best"] == 16
    assert "largest batch: --config.stream.batch=16" in capsys.readouterr().out
    found = session.search(config(stream=config()["stream"] | {"batch": 96}), "microbatches")
    assert found["search"]["best"] == 6


FIELDS = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what configs name, in small: a text, a tokenizer, and the config.json of a checkpoint."""
    root = tmp_path_factory.mktemp("aot")
    (root / "a.txt").write_text("\n\n".join(f"document {i} says {i * i} " * 12 for i in range(100)))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text(tokenizer.byte_json())
    (root / "config.json").write_text(json.dumps(FIELDS))
    return root


def shipped(name, folder):
    """Returns a config of configs/ with a small model, small rows and the text of the folder."""
    given = importlib.import_module(f"configs.{name}")
    found = given.get_config(str(folder)) if name == "multilingual" else given.get_config()
    one, _ = abstract.one_run(main.plain(found))
    changes = {"preset": "tiny", "vocab": 264}
    one["model"] = {"checkpoint": str(folder)} if "checkpoint" in one["model"] else one["model"] | changes
    if one["model"].get("checkpoint") or name == "pod":
        one["tokenizer"] = {"name": "byte"}
    text = {"name": "text", "path": str(folder / "a.txt"), "split": "paragraph"}
    one["sources"] = dict.fromkeys(one["sources"], text)
    one["packing"] = {"length": 32, "directory": str(folder / "rows")}
    one["stream"]["batch"], one["evaluation"]["rows"] = 8, 8
    return one | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}


PROBLEMS = {path.stem for path in (ROOT / "configs").glob("*rl*.py")}
IMAGES = {"split_digits", "long_tail", "hyperinterval", "hyperinterval_compare", "hyperinterval_protocols"}
IMAGES |= {"analytic", "analytic_streams", "analytic_compare", "analytic_papers"}


@pytest.mark.parametrize("name", ["split_digits", "analytic", "hyperinterval", "hyperinterval_protocols"])
def test_the_abstract_step_of_a_classifier_of_images_is_that_of_the_run(name):
    config, _ = abstract.one_run(main.plain(importlib.import_module(f"configs.{name}").get_config()))
    config["sources"] = {key: one | {"count": 64, "held_out": 16} for key, one in config["sources"].items()}
    config |= {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    made, step = program.build(**train.split(config)[1]), abstract.make(config, jax.devices())
    trained = [(state.params, state.opt_state) for state in (step.state, made.abstract)]  # rows in memory are flat here
    told = [jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding.spec), tree) for tree in trained]
    assert told[0] == told[1]
    assert ("ledger" in step.state.params) == name.startswith("hyperinterval")


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_runs_on_problems_are_refused(name):
    config, _ = abstract.one_run(main.plain(importlib.import_module(f"configs.{name}").get_config()))
    with pytest.raises(UserError, match=r"config\.sources: problems; only runs on text and tables"):
        abstract.make(config, jax.devices())


@pytest.mark.parametrize("name", sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - PROBLEMS - IMAGES))
def test_the_abstract_step_is_that_of_the_run(name, folder):
    config = shipped(name, folder)
    made = program.build(**train.split(config)[1])
    step = abstract.make(config, jax.devices())

    def told(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding.spec), tree)

    assert told(step.state) == told(made.abstract)
    assert told(step.batch) == told(made.place(0))
    assert step.facts()["parameters"] == made.facts["parameters"]
    assert step.facts()["flops_per_step"] == made.facts["flops_per_token"] * 8 * 32
    assert step.facts()["state_leaves"] == len(jax.tree.leaves(made.abstract))


def test_neither_data_nor_tokenizer_nor_weights_are_needed(folder):
    away = config(sources={"x": {"name": "jsonl", "path": "/no/such/*.jsonl"}}, tokenizer={"name": "hf", "path": "/no"})
    away["stream"] |= {"stages": [{"name": "x", "mixture": {"x": 1.0}}], "batch": 8}
    step = abstract.make(away, jax.devices())
    assert step.state.params["embedding"].shape == (264, 32)
    assert step.batch.inputs.shape == (8, 256)
    assert step.notes == ("no tokenizer at /no: 264 tokens are assumed",)
    away |= {"model": {"checkpoint": str(folder)}, "adapter": "lora", "tokenizer": None}
    step = abstract.make(away, jax.devices())
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(step.state.memory)}
    assert "bfloat16" in kinds  # the frozen base keeps the type that config.json names
    assert step.facts()["trained_parameters"] < step.facts()["parameters"] / 2


def test_a_mesh_cuts_what_it_cannot_divide_and_says_so():
    odd = config(mesh={"data": 2, "tensor": 4})
    odd["stream"]["batch"] = 8
    assert any("kv_heads" in note for note in abstract.make(odd, jax.devices()).notes)


def test_the_step_knows_its_mesh_while_it_is_traced(folder):
    step = abstract.make(shipped("quickstart", folder), jax.devices())
    text = str(step.run.trace(step.state, step.batch).jaxpr)
    assert text.count("sharding_constraint") >= 3  # the embedding, and twice in a block


def test_axes_that_the_torus_does_not_hold_are_one_line(monkeypatch):
    def refuse(*sizes, **options):
        raise NotImplementedError("at length")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(UserError, match=r"config.mesh: data=4 x fsdp=2: cannot be laid out on the torus"):
        abstract.make(config(), jax.devices())


def test_variants_of_a_sweep_are_chosen_by_label():
    whole = main.plain(importlib.import_module("configs.compare").get_config())
    assert abstract.one_run(whole)[0]["label"] == "naive"
    assert abstract.one_run(whole, "MER")[0]["method"].startswith("reptile")
    with pytest.raises(UserError, match="did you mean 'MER'"):
        abstract.one_run(whole, "MERR")
    with pytest.raises(UserError, match="no sweep"):
        abstract.one_run(config(), "MER")


def call(*arguments):
    """Runs the command as a user does."""
    argv = [sys.executable, "-m", "jaxcl.aot", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_line_complains_in_one_line():
    run = call("--topology=v5p:8x8", "--config=configs/quickstart.py")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: --topology=v5p:8x8: v5p takes three sizes")
    assert run.stderr.count("\n") == 1


SMALL = ("--topology=v5e:2x2", "--config=configs/quickstart.py", "--config.model.preset=tiny", "--config.mesh.data=4")


@pytest.mark.skipif(not topology._installed("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_a_step_is_compiled_for_a_tpu_that_is_not_here(tmp_path):
    run = call(*SMALL, f"--out={tmp_path / 'a.json'}")
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["fits"]
    assert found["device"] == "TPU v5 lite"
    assert found["donation"]["aliased_inputs"] == found["donation"]["state_leaves"]
    assert found["memory_gib"]["arguments"] * 2**30 > found["state_bytes_per_device"]
    assert found["collectives"]["all-reduce"]["times"] >= 1
    assert found["floors"]["compute_s"] > 0
    assert "fits:" in run.stdout
    assert run.stderr == ""


@pytest.mark.skipif(not topology._installed("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_what_is_too_large_is_refused_with_the_shortfall():
    run = call(*SMALL, "--config.packing.length=512", "--config.stream.batch=16384", "--quick")
    assert run.returncode == 1, run.stderr
    assert "GiB short" in run.stdout
    assert "--config.model.remat=full" in run.stdout
