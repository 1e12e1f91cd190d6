"""Ahead of time, without a compiler: what users give, classifiers of tables, interruptions, and what is printed."""

import importlib
import json
import os
import re
import signal
import threading
from types import SimpleNamespace
from typing import Any

import aot_test
import jax
import numpy as np
import pytest

from jaxcl import main, program, train
from jaxcl import mesh as meshes
from jaxcl.aot import __main__ as command
from jaxcl.aot import abstract, knobs, show, topology
from jaxcl.data.sources import Table, images
from jaxcl.kernels import attention
from jaxcl.models import transformer
from jaxcl.schema import UserError

FLAGS = ["--topology=v5e:2x4", "--config=configs/quickstart.py", "--config.mesh.data=8"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The devices of this machine instead of those of a topology."""
    monkeypatch.chdir(aot_test.ROOT)
    monkeypatch.setattr(topology, "ENVIRONMENT", {})
    monkeypatch.setattr(topology, "devices", lambda target: jax.devices())


def images_of_zeros(*, dataset: str, labels: list | None = None, data_dir: str | None = None) -> Table:
    """A source of rows of six features."""
    ints = np.zeros(20, np.int32)
    rows = {"inputs": np.zeros((20, 6), np.float32), "targets": ints, "segments": ints, "positions": ints}
    rows["weights"] = np.ones(20, np.float32)
    return Table({"name": "images"}, rows, rows)


def classifier(**changes):
    """A config of two tables."""
    base = aot_test.config(method="er(capacity=16, fraction=0.5) + ewc")
    del base["packing"], base["tokenizer"]
    base["model"] = {"name": "mlp", "inputs": 6, "hidden": [8], "classes": 4}
    base["sources"] = {name: {"name": "images", "dataset": "x"} for name in "ab"}
    base["stream"] = {"batch": 8, "steps": 3, "stages": [{"name": n, "mixture": {n: 1.0}} for n in "ab"]}
    return base | changes


def test_the_step_of_a_classifier_is_that_of_the_run(monkeypatch):
    monkeypatch.setattr(images, "make", images_of_zeros)
    made = program.build(**train.split(classifier())[1])
    monkeypatch.setattr(images, "make", unread)
    step = abstract.make(classifier(), jax.devices())

    def told(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding.spec), tree)

    assert told(step.state) == told(made.abstract)
    assert told(step.batch) == told(made.place(0))
    assert step.facts()["flops_per_step"] == made.facts["flops_per_token"] * 8
    assert step.notes == ("rows of 6 features are assumed, in one dimension",)
    assert [knob.name for knob in knobs.single(classifier(), {"data": 2})] == ["fsdp", "microbatches"]


def unread(*, dataset: str, labels: list | None = None, data_dir: str | None = None) -> Table:
    """A source whose data is not here."""
    raise AssertionError("read")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": {"length": 8}}, r"config\.packing: config\.sources are tables"),
        ({"model": {"name": "transformer", "preset": "tiny"}}, r"config\.model\.inputs=None.*give it"),
        ({"model": {"checkpoint": "/no"}}, r"config\.model\.checkpoint: a language model"),
        ({"sources": {"a": {"name": "image"}}}, r"sources\.a\.name='image'.*did you mean 'images'"),
        ({"sources": {"a": {"name": "images"}, "b": {"name": "text"}}}, "a is a table and b is text"),
        ({"sources": {"a": {"name": "text"}}, "model": {"name": "transformer"}}, r"config\.packing\.length: missing"),
    ],
)
def test_a_config_that_no_run_takes_is_refused_as_by_the_run(changes, words):
    with pytest.raises(UserError, match=words):
        abstract.make(classifier(**changes), jax.devices())


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("", "--out=: empty; name a JSON file"),
        ("{}", "is a folder; name a JSON file"),
        ("{}/old.json", "exists; write to another --out, or remove it"),
        ("{}/no/new.json", "no folder .*/no; make it first"),
        ("/proc/new.json", r"cannot be written \(.*\); choose another folder"),
    ],
)
def test_where_to_write_is_checked_before_anything_is_compiled(out, words, tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("old")
    monkeypatch.setattr(command, "Session", None)
    with pytest.raises(UserError, match=words):
        command.main([*FLAGS, f"--out={out.format(tmp_path)}"])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "old")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the loader of ml_collections
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workdir=x"], "--workdir: nothing is trained here"),
        (["-workdir", "x"], "--workdir: nothing is trained here"),
        (["--unknown=1"], r"flag 'unknown'; usage: python -m jaxcl\.aot --topology=KIND:SIZES"),
        (["--config=/no.py"], r"/no\.py'; usage: python -m jaxcl\.aot"),
    ],
)
def test_messages_show_the_usage_of_this_command(flags, words):
    with pytest.raises(UserError, match=words) as error:
        command.main([*FLAGS, *flags])
    assert "jaxcl.main" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("v5e:3x3", ["v5e:2x2", "v5e:4x4"]),
        ("v6e:3x5", ["v6e:2x4", "v6e:4x6"]),
        ("v5e:1x8", ["v5e:2x8"]),
        ("v5p:1x1x3", ["v5p:2x2x3"]),
        ("v7x:2x7x3", ["tpu7x:2x6x3", "tpu7x:2x8x3"]),
    ],
)
def test_shapes_that_no_host_makes_up_are_refused_with_those_nearby(text, near):
    with pytest.raises(UserError, match="the first two sizes must be even") as error:
        topology.parse(text)
    assert str(error.value).split("nearby: ")[1].split(", ") == near
    assert all(topology.parse(other) for other in near)


def test_kinds_of_chips_are_listed_and_have_their_usual_names():
    assert topology.parse("v7x:2x2x1").kind == "tpu7x"
    assert topology.parse("v5p:1x1x1").sizes == (1, 1, 1)
    with pytest.raises(UserError, match="choose from v4, v5e, v5p, v6e, tpu7x, h200, v7x"):
        topology.parse("v9:2x2")


@pytest.mark.parametrize("limit", [1, 5, 77, 6220, 131_073, 10**6 + 3])
@pytest.mark.parametrize("base", [0.0, 0.3])
def test_a_search_ends_soon_near_the_limit(limit, base):
    asked = []

    def share(number):
        asked.append(number)
        return base + (1 - base) * number / limit

    found = knobs.largest(share, 4)
    assert limit * 15 / 17 <= found <= limit
    assert len(asked) == len(set(asked)) <= 12


def test_a_search_survives_a_jump_that_was_too_far():
    asked = []

    def share(number):
        asked.append(number)
        return 0.001 if number < 50 else 2.0

    assert 47 <= knobs.largest(share, 1) <= 49
    assert len(asked) <= 12


class Stuck(aot_test.Fake):
    """A session whose compiler hangs at the third program, while somebody presses Ctrl-C."""

    calls = 0

    def compile(self, config):
        type(self).calls += 1
        if self.calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(20)
        return super().compile(config)


@pytest.fixture
def stuck(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.setattr(main, "read", lambda argv, usage: (aot_test.config(), ""))
    monkeypatch.setattr(command, "Session", type("Stuck", (Stuck,), {}))
    yield command.Session
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("flags", "key"), [(["--search"], "search"), ([], "knobs")])
def test_what_was_found_before_an_interruption_is_written(flags, key, stuck, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([*FLAGS, *flags, f"--out={tmp_path / 'a.json'}"])
    assert ended.value.code == 130
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["interrupted"] is True
    assert len(found["search"]["needed_gib"]) == 2 if key == "search" else len(found["knobs"]) == 1
    err = capsys.readouterr().err
    assert err == f"interrupted; {tmp_path / 'a.json'} has what was found until then\n"


def test_an_interruption_before_the_first_program_writes_nothing(stuck, tmp_path, capsys):
    stuck.calls = 2
    with pytest.raises(SystemExit) as ended:
        command.main([*FLAGS, f"--out={tmp_path / 'a.json'}"])
    assert (ended.value.code, list(tmp_path.iterdir())) == (130, [])
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_errors_of_the_thread_are_those_of_the_command():
    def fail():
        raise UserError("x")

    with pytest.raises(UserError, match=r"^x$"):
        command.patiently(fail)


@pytest.mark.parametrize(
    ("platform", "width", "dtype", "options", "words"),
    [
        ("tpu", 8, "float32", {}, "heads of width 8; they take 64, 128, 256"),
        ("tpu", 64, "float16", {}, "float16; that for tpu takes float32 or bfloat16"),
        ("tpu", 64, "float32", {"bias": True}, "bias"),
        ("tpu", 64, "float32", {"implementation": "tiles"}, "'tiles' takes none"),
        ("cuda", 64, "bfloat16", {}, "never run.*'kernel' does"),
        ("cuda", 64, "float32", {"implementation": "kernel"}, "float32; that for cuda takes bfloat16 or float16"),
        ("cpu", 64, "float32", {}, "none for cpu"),
    ],
)
def test_there_is_a_reason_when_no_kernel_is_taken(platform, width, dtype, options, words):
    found = attention.refused(platform, width, dtype, **options)
    assert found
    assert re.search(words, found)


def test_a_kernel_that_is_taken_needs_no_reason():
    assert attention.refused("tpu", 64, "bfloat16") is None
    assert attention.refused("cuda", 128, "bfloat16", implementation="kernel") is None


@pytest.mark.parametrize(
    ("part", "count", "platform", "words"),
    [
        ("acil", 1, "tpu", ""),
        ("acil", 2, "tpu", "ridge sums: rows are cut over data: every device updates its own in plain XLA"),
        ("acil", 1, "cuda", "ridge sums: that for Hopper GPUs has never run; kernel=True takes it"),
        ("nmc", 1, "tpu", "the method updates no matrix of products"),
    ],
)
def test_the_reason_of_ridge_sums_is_shown(part, count, platform, words):
    config = main.plain(importlib.import_module("configs.analytic").get_config(part))
    step = abstract.make(config | {"mesh": {"data": count}}, jax.devices()[:count])
    assert (step.no_kernel(platform) or "") == words


def test_the_reason_is_shown():
    def reason(shape):
        network = SimpleNamespace(shape=shape, analytic=None)
        step: Any = SimpleNamespace(plan=SimpleNamespace(network=network, mesh=meshes.make(data=8)))
        return abstract.Step.no_kernel(step, "tpu") or ""

    narrow = reason(transformer.shape(preset="tiny", vocab=264))
    assert narrow == "config.model: heads of width 8; they take 64, 128, 256"
    assert reason(transformer.shape(preset="tiny", vocab=264, head_dim=64)) == ""
    assert "'tiles' takes none" in reason(transformer.shape(preset="tiny", vocab=264, head_dim=64, attention="tiles"))
    assert reason(None) == "no attention in the model"
    sizes = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code", "peak"), 0.0)
    known = {"memory_gib": sizes, "collectives": {}, "pallas": {}, "donation": {"aliased_inputs": 1, "state_leaves": 1}}
    whole = {**aot_test.RESULT, **known, "needed_gib": 1e-6, "available_gib": 4.0, "fits": True}
    lines = show.table({**whole, "no_kernel": narrow, "floors": {"compute_s": 3.2e-6}})
    assert "  Pallas kernels  none: config.model: heads of width 8; they take 64, 128, 256" in lines
    assert "  floor           3.20 us a step from arithmetic at peak" in lines
    assert lines[-1] == "fits: 1.0 KiB of 4.00 GiB (less than 1%), 4.00 GiB free"
    assert "in 1 pass:" in "".join(lines)


def test_units_fit_the_size():
    assert [show.gib(x) for x in (12.0, 0.05, 1e-6, 1e-8, 0.0)] == ["12.00 GiB", "51.2 MiB", "1.0 KiB", "11 B", "0 B"]
    assert [show.duration(x) for x in (2.0, 0.16, 2e-5, 1e-9)] == ["2.00 s", "160.00 ms", "20.00 us", "1.00 ns"]
