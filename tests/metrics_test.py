"""Records survive crashes, resumption cuts exactly what will be written again, and progress stays readable."""

import io
import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxcl import metrics, progress
from jaxcl.schema import UserError


def train(step, **more):
    return {"kind": "train", "step": step, "task": 0, "stage": "en", "loss": 1.0 / (step + 1), **more}


def written(path, records):
    writer = metrics.Jsonl(path)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_records_round_trip_and_arrays_become_numbers(tmp_path):
    record = {
        "kind": "train",
        "step": np.int32(3),
        "loss": jnp.float32(0.1),
        "half": jnp.bfloat16(1.5),
        "ok": np.bool_(True),
        "parts": np.arange(3),
        "bad": float("nan"),
        "worse": np.float32("inf"),
        "text": "a\nb\r\u2028",
    }
    (got,) = metrics.read(written(tmp_path / "m.jsonl", [record]))
    assert got["loss"] == float(np.float32(0.1))  # every bit of the float32
    assert (got["step"], got["half"], got["ok"], got["parts"]) == (3, 1.5, True, [0, 1, 2])
    assert got["bad"] is None
    assert got["worse"] is None
    assert got["text"] == record["text"]
    assert list(got) == list(record)
    with pytest.raises(TypeError, match="not object"):
        metrics.plain(object())


def test_every_line_is_visible_at_once_and_appended(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = metrics.Jsonl(path)
    writer.write(train(1))
    assert len(metrics.read(path)) == 1  # not closed, not synced
    writer.close()
    writer.close()
    written(path, [train(2)])
    assert [r["step"] for r in metrics.read(path)] == [1, 2]


@given(torn=st.integers(1, 60), restored=st.integers(-1, 6))
def test_crash_and_resume_give_the_file_of_an_uninterrupted_run(tmp_path_factory, torn, restored):
    """Killed anywhere within a line, restored at any step: the file is bit-equal to that of a run without a crash."""
    folder = tmp_path_factory.mktemp("run")
    records = [train(step) for step in range(6)]
    whole = written(folder / "whole.jsonl", records).read_bytes()
    path = written(folder / "m.jsonl", records)
    path.write_bytes(whole[:-torn])
    survivors = len(metrics.read(path))
    assert survivors == whole[:-torn].count(b"\n")
    metrics.truncate(path, restored)
    written(path, [r for r in records if r["step"] > min(restored, survivors - 1)])
    assert path.read_bytes() == whole
    assert os.listdir(folder).count("m.jsonl") == 1
    assert len(os.listdir(folder)) == 2  # no temporary file is left


def test_truncate_keeps_the_restored_step_and_counts(tmp_path):
    path = written(tmp_path / "m.jsonl", [train(s) for s in (1, 2, 2, 3)])
    path.chmod(0o640)
    assert metrics.truncate(path, 2) == 1
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 2]
    assert path.stat().st_mode & 0o777 == 0o640
    before = path.stat().st_ino
    assert metrics.truncate(path, 2) == 0
    assert path.stat().st_ino == before  # untouched
    assert metrics.truncate(tmp_path / "none.jsonl", 2) == 0


def test_a_writer_that_is_open_follows_the_file_that_truncate_put_in_its_place(tmp_path):
    """A rollback cuts the file while the run goes on writing to it."""
    path = tmp_path / "m.jsonl"
    writer = metrics.Jsonl(path)
    for step in (1, 2, 3):
        writer.write(train(step))
    metrics.truncate(path, 1)
    writer.write(train(2, loss=9.0))
    writer.close()
    assert [(r["step"], r["loss"]) for r in metrics.read(path)] == [(1, 0.5), (2, 9.0)]


def test_truncate_replaces_the_file_atomically(tmp_path, monkeypatch):
    path = written(tmp_path / "m.jsonl", [train(1), train(2)])
    whole = path.read_bytes()

    def crash(*args):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="killed"):
        metrics.truncate(path, 1)
    assert path.read_bytes() == whole


def test_appending_after_a_torn_line_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"kind":"train","step":1}\n{"kind":"tra')
    written(path, [train(2)])
    assert [r["step"] for r in metrics.read(path)] == [1, 2]


def test_damage_in_the_middle_is_reported_with_its_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind":"train","step":1}\n{"kind":\n{"kind":"train","step":3}\n')
    with pytest.raises(UserError, match="line 2: not a JSON object"):
        metrics.read(path)
    path.write_text('{"kind":"train"}\n{"kind":"train","step":3}\n')
    with pytest.raises(UserError, match="line 1: a record needs"):
        metrics.read(path)
    with pytest.raises(UserError, match="no such file"):
        metrics.read(tmp_path / "none.jsonl")


def test_scalars_are_named_by_kind():
    record = {"kind": "eval", "step": 5, "boundary": None, "loss": {"en": 2.0, "fr": 3.0}, "stage": "en", "ok": True}
    assert dict(metrics.scalars(record)) == {"eval/loss/en": 2.0, "eval/loss/fr": 3.0}


def events(folder):
    """Yields (step, tag, value) from TensorBoard files: TFRecord framing around Event messages."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                yield event.step, "purged", event.session_log.status
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_tensorboard_gets_every_number_and_resumes(tmp_path):
    writer = metrics.TensorBoard(tmp_path)
    writer.write(train(1, time={"tokens_per_s": 10.0}))
    writer.sync()
    writer.close()
    got = {(step, tag): value for step, tag, value in events(tmp_path)}
    assert got[1, "train/loss"] == 0.5
    assert got[1, "train/time/tokens_per_s"] == 10.0
    metrics.TensorBoard(tmp_path, resume_step=7).close()
    assert any(tag == "purged" and step == 8 for step, tag, _ in events(tmp_path))


def test_several_writers_get_the_same_records(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    writer = metrics.Several([metrics.Jsonl(path) for path in paths])
    writer.write(train(1))
    writer.sync()
    writer.close()
    assert paths[0].read_bytes() == paths[1].read_bytes() != b""


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shown(terminal, steps=10):
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, no_color=True)
    show = progress.Progress(steps, ["en", "fr"], every_s=5, console=console, clock=clock)
    show.write({"kind": "eval", "step": 0, "task": -1, "boundary": -1, "loss": {"en": 3.0, "fr": 4.0}})
    for step in range(1, steps + 1):
        clock.now += 2
        show.write(train(step, lr=1e-3, time={"tokens_per_s": 12345.0}))
        if step == 4:
            show.write({"kind": "event", "step": 4, "event": "skip", "message": "gradient [not] finite"})
            show.write({"kind": "eval", "step": 4, "task": 0, "boundary": None, "loss": {"en": 2.5, "fr": None}})
    show.close()
    return stream.getvalue()


def test_plain_progress_is_calm_and_complete():
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "step 0/10  [en 3.000, fr 4.000]"
    assert "step 4  skip: gradient [not] finite" in lines
    assert lines[-1] == "step 10/10  task 1/2 en  loss 0.091  lr 1.00e-03  12.3k tokens/s  [en 2.500, fr not finite]"
    assert len(lines) == 6  # 20 s at one line per 5 s at the most, the event, and the end
    assert any("14 s left" in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_the_last_evaluation_is_shown_once():
    """The loop writes the last step, then the evaluation at the end of the last task."""
    stream = io.StringIO()
    show = progress.Progress(2, console=Console(file=stream, width=100), clock=Clock())
    for step, loss in enumerate((3.0, 2.0, 1.0)):
        if step:
            show.write(train(step))
        show.write({"kind": "eval", "step": step, "boundary": step - 1, "loss": {"en": loss}})
    show.write({"kind": "ledger", "step": 2, "sources": {}})
    show.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"]
    assert [line[-10:] for line in lines] == ["[en 3.000]", "[en 2.000]", "[en 1.000]"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_classifiers_shows_what_is_right(terminal):
    """Losses of a head in closed form on classes that it has not seen are of any size."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, no_color=True)
    show = progress.Progress(2, console=console, clock=Clock())
    for step, right in ((0, 0.25), (1, 0.5)):
        record = {"kind": "eval", "step": step, "boundary": step - 1, "loss": {"digits": 812.0}}
        show.write({**record, "accuracy": {"digits": right}, "classes": {"digits": {"0": right}}})
    show.close()
    assert "812" not in stream.getvalue()
    assert "25.0 % right" in stream.getvalue()
    assert "50.0 % right" in stream.getvalue()
    assert show.line() == "step 0/2  [digits 50.0 % right]"


def test_progress_shows_the_share_of_the_peak_where_it_is_known():
    show = progress.Progress(10, console=Console(file=io.StringIO()))
    show.write(train(1, time={"tokens_per_s": 12345.0, "mfu": 0.4137}))
    assert "12.3k tokens/s  MFU 41 %" in show.line()
    show.write(train(2, time={"tokens_per_s": 12345.0}))
    assert "MFU" not in show.line()


def test_progress_counts_rows_of_tables():
    show = progress.Progress(10, unit="rows", console=Console(file=io.StringIO()))
    show.write(train(1, time={"tokens_per_s": 12345.0}))
    assert "12.3k rows/s" in show.line()


def test_live_progress_shows_bar_losses_and_time_left():
    text = shown(terminal=True)
    for part in ("100 %", "step 10 of 10", "domain", "-0.500", "not finite", "tokens/s", "left"):
        assert part in text


def test_time_left_counts_the_steps_of_this_process_after_compiling():
    clock = Clock()
    show = progress.Progress(100, start=90, console=Console(file=io.StringIO()), clock=clock)
    assert show.eta_s() is None
    clock.now = 1000.0  # compiling
    show.write(train(91))
    assert show.eta_s() is None
    clock.now += 8.0
    show.write(train(95))
    assert show.eta_s() == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (273600, "3 d 04 h")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_file_is_plain_json_for_other_tools(tmp_path):
    path = written(tmp_path / "m.jsonl", [{"kind": "event", "step": 0, "event": "é", "value": float("-inf")}])
    line = path.read_bytes()
    assert line.isascii()
    assert json.loads(line) == {"kind": "event", "step": 0, "event": "é", "value": None}
