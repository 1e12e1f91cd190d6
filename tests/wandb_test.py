"""The Weights & Biases writer against a stand-in for the client, and against the client itself if it is installed."""

import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small

from jaxcl import metrics
from jaxcl import train as loop
from jaxcl.schema import UserError


def train(step, **more):
    return {"kind": "train", "step": step, "task": 0, "stage": "en", "loss": 1.0 / (step + 1), **more}


class Client:
    """The behaviour of the wandb module that the writer depends on; `runs` holds id -> rows of history."""

    class Error(Exception):
        pass

    def __init__(self):
        self.runs, self.axes, self.open = {}, {}, []

    def init(self, *, dir, project, id, resume, config):
        assert resume == "allow"
        assert Path(dir).is_dir()
        json.dumps([project, config])
        self.open.append(id)
        self.runs.setdefault(id, [])
        client = self

        class Run:
            def define_metric(self, name, step_metric=None):
                client.axes[name] = step_metric

            def log(self, data, step=None):
                assert id in client.open
                history = client.runs[id]
                now = history[-1]["_step"] + 1 if history else 0
                if step is not None and step < now:
                    return  # "steps must be monotonically increasing, so this data will be ignored"
                history.append({"_step": now if step is None else step, **data})

            def finish(self):
                client.open.remove(id)

        return Run()


def last_by_step(history, name):
    """Returns step -> value as a chart over the step of the run draws it."""
    return {row["step"]: row[name] for row in history if name in row}


def test_wandb_gets_every_number_also_those_that_are_written_again(tmp_path, monkeypatch):
    """Killed after step 5, restored from step 3, and other values from there on, as after a rollback."""
    client = Client()
    monkeypatch.setitem(sys.modules, "wandb", client)
    options = {"project": "p", "run_id": "r7", "config": {"seed": 0, "peak": np.float32(0.5)}}
    writer = metrics.Wandb(tmp_path, **options)
    writer.write({"kind": "eval", "step": 0, "loss": {"en": 3.0}, "alignment": {"en": {"fr": 0.25}}, "boundary": None})
    for step in range(1, 6):
        writer.write(train(step))
    writer.write({"kind": "event", "step": 5, "event": "rollback", "message": "back to step 3"})
    writer.sync()
    writer.close()
    assert client.axes == {"step": None, "*": "step"}
    writer = metrics.Wandb(tmp_path, **options)
    for step in range(4, 7):
        writer.write(train(np.int32(step), loss=10.0 + step, bad=float("nan")))
    writer.close()
    assert client.open == []
    assert list(client.runs) == ["r7"]
    expected = {1: 1 / 2, 2: 1 / 3, 3: 1 / 4, 4: 14.0, 5: 15.0, 6: 16.0}
    assert last_by_step(client.runs["r7"], "train/loss") == expected
    assert client.runs["r7"][0] == {"_step": 0, "eval/loss/en": 3.0, "eval/alignment/en/fr": 0.25, "step": 0}
    assert all(len(row) > 2 for row in client.runs["r7"])  # the event has no number
    assert not any("train/bad" in row for row in client.runs["r7"])


def test_a_refusal_of_wandb_is_one_line(tmp_path, monkeypatch):
    client = Client()

    def init(**options):
        raise client.Error("api_key not configured (no-tty).\n  call wandb.login()")

    client.init = init
    monkeypatch.setitem(sys.modules, "wandb", client)
    with pytest.raises(UserError, match=r"config.wandb='p': api_key.*WANDB_MODE=offline") as caught:
        metrics.Wandb(tmp_path, project="p", run_id="r", config={})
    assert "\n" not in str(caught.value)


def test_missing_wandb_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.wandb: wandb is not installed; run pip install 'jaxcl\[wandb\]'"):
        loop.run(small.config(tmp_path, wandb="p"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def offline(folder):
    """Yields the records of all offline files, in the order of the starts: a log in blocks, as of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name):
        data, at, parts = file.read_bytes(), 7, b""
        while at < len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, size, kind = struct.unpack_from("<IHB", data, at)
            parts += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(parts)
                parts = b""


def test_the_client_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path), "CONFIG_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for first, scale in ((1, 1.0), (4, 10.0)):  # killed after step 5, restored from step 3, with other values
        writer = metrics.Wandb(tmp_path, project="p", run_id="r7", config={"seed": 3})
        for step in range(first, first + 5):
            writer.write(train(step, loss=scale * step))
        writer.close()
        time.sleep(1.1)  # the client names the folder of a start by its second
    records = [*offline(tmp_path)]
    assert {record.run.run_id for record in records if record.HasField("run")} == {"r7"}
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert axes["*"] == "step"
    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert last_by_step(rows, "train/loss") == {1: 1.0, 2: 2.0, 3: 3.0, **{step: 10.0 * step for step in range(4, 9)}}
