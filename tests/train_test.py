"""The loop on bad days: signals, damaged checkpoints, bad steps, edited stages."""

import contextlib
import copy
import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import toys

from jaxcl import distributed, domains, flops, losses, metrics, network, plan, program, train
from jaxcl.data import rows as tables
from jaxcl.data import tokenizer
from jaxcl.random import key_for
from jaxcl.schema import UserError
from jaxcl.types import Method, Output, TrainState


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


@pytest.fixture(scope="module")
def straight(folder):
    return small.straight(folder)


def stopped_at(folder, workdir, step, settings=None, name="SIGTERM", method="account"):
    """Runs until a signal arrives at `step` and returns the exit status."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        small.strike(monkeypatch, name, step, method)
        return train.run(settings or small.config(folder), str(workdir))


def go_on(folder, workdir, settings=None, **options):
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch, **options)
        return train.run(settings or small.config(folder), str(workdir))


def test_every_step_is_written_once_and_every_boundary_evaluated(straight):
    assert [r["step"] for r in small.records(straight, "train")] == list(range(1, small.TOTAL + 1))
    evals = {r["step"]: r["boundary"] for r in small.records(straight, "eval")}
    assert evals == {0: -1, 4: None, 8: 0, 12: None, 16: 1, 20: None, 24: 2}
    assert small.events(straight) == []
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["18", "21", "24"]


def test_at_every_boundary_the_gradients_of_the_domains_are_compared(straight, folder):
    _, _, made = small.shared(folder)
    told = {r["boundary"]: r.get("alignment") for r in small.records(straight, "eval")}
    assert set(told) == {-1, 0, 1, 2, None}
    assert told.pop(None) is None
    for table in told.values():
        cosines = np.array([[table[a][b] for b in made.stream.sources] for a in made.stream.sources])
        np.testing.assert_allclose(np.diagonal(cosines), 1, rtol=1e-5)
        np.testing.assert_array_equal(cosines, cosines.T)
        assert np.all(np.abs(cosines) <= 1 + 1e-6)
    assert told[-1] != told[0] != told[1] != told[2]
    spent = [r["time"] for r in metrics.read(straight / "metrics.jsonl") if r["kind"] == "eval"]
    assert ["alignment_s" in times for times in spent] == [True, False, True, False, True, False, True]


def test_what_is_compared_is_the_gradient_of_the_training_loss(straight, folder):
    """Against gradients of the first held-out batch of each domain, flattened and multiplied in float64."""
    settings, _, made = small.shared(folder)
    words = tokenizer.make()
    corpora = domains.of_text(settings["sources"], words, domains.Packing(**settings["packing"]))
    model = network.make(settings["model"], words, settings["packing"]["length"]).model
    params = made.create().params

    def loss(params, rows):
        total, weight = losses.cross_entropy(model.apply(params, rows), rows)
        return total / weight

    gradient = toys.quick(jax.grad(loss))
    flat = []
    for corpus in corpora.values():
        grads = gradient(params, next(tables.batches(corpus.held_out, size=8, limit=8)))
        flat.append(np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(grads)]))
    unit = np.stack([g / np.linalg.norm(g) for g in flat])
    told = next(r["alignment"] for r in small.records(straight, "eval") if r["boundary"] == -1)
    found = [[told[a][b] for b in corpora] for a in corpora]
    np.testing.assert_allclose(found, unit @ unit.T, atol=1e-5)
    assert np.ptp(found) > 0.01  # the domains differ


def test_the_share_of_the_peak_is_written_where_the_peak_is_known(folder, straight, tmp_path, monkeypatch):
    times = [r["time"] for r in metrics.read(straight / "metrics.jsonl") if r["kind"] == "train"]
    assert not any("mfu" in time for time in times)  # of a CPU
    assert "mfu" not in (straight / "report.html").read_text().lower()
    monkeypatch.setattr(flops, "PEAKS", (("cpu", 1e12),))
    settings, own, made = small.shared(folder)
    _, pieces = train.split(settings)
    known = program.build(**{**pieces, "mesh": {"devices": jax.devices()[:2], "data": 2}})
    cost, peak = known.facts["flops_per_token"], known.facts["peak_flops_per_device"]
    assert (cost, peak) == (made.facts["flops_per_token"], 1e12)
    assert known.utilisation(1000.0) == pytest.approx(1000.0 * cost / 2e12)
    small.strike(monkeypatch, "SIGTERM", 2)
    session = train.Session(made._replace(utilisation=known.utilisation), own, tmp_path / "run", settings)
    with pytest.raises(train.Stopped), distributed.stop_on_signal() as stopped:
        session.train(stopped)
    session.close()
    times = [r["time"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert len(times) == 3
    for time in times:
        assert time["mfu"] == pytest.approx(time["tokens_per_s"] * cost / 2e12)


def test_run_json_says_where_the_data_came_from(straight, folder):
    sources = json.loads((straight / "run.json").read_text())["facts"]["sources"]
    _, _, made = small.shared(folder)
    assert list(sources) == ["d0", "d1", "d2"]
    assert {name: about["held_out"]["fingerprint"] for name, about in sources.items()} == made.held_out
    assert sources["d1"]["source"]["path"] == small.config(folder)["sources"]["d1"]["path"]
    text = (straight / "report.html").read_text()
    for about in sources.values():
        assert about["train"]["fingerprint"][:12] in text
    assert about["train"]["fingerprint"] not in text


def test_the_ledger_counts_what_the_batches_held(straight, folder):
    _, _, made = small.shared(folder)
    (ledger,) = [r["sources"] for r in small.records(straight, "ledger") if r["step"] == small.TOTAL]
    batches = [made.stream.at(step) for step in range(small.TOTAL)]
    replayed = sum(int(batch.extra["replayed"].sum()) for batch in batches)
    tokens = sum(float(batch.weights.sum()) for batch in batches)
    assert sum(counts["replayed_rows"] for counts in ledger.values()) == replayed == 2 * 8 * 2  # 25 % of stages 2, 3
    assert sum(counts["new_rows"] for counts in ledger.values()) == small.TOTAL * 8 - replayed
    assert sum(counts["new_tokens"] + counts["replayed_tokens"] for counts in ledger.values()) == tokens


def test_a_config_reaches_every_piece(folder, monkeypatch):
    other, seen, make = small.shared(folder)[2], [], program.compose.make
    monkeypatch.setattr(
        program.compose, "make", lambda options, setting: seen.append(setting) or make(options, setting)
    )
    settings = small.config(folder, seed=5, microbatches=2, loss={"z_loss": 0.1})
    made = program.build(**{**train.split(settings)[1], "mesh": {"devices": jax.devices()[:1]}})
    (setting,) = seen
    assert (setting.microbatches, setting.tasks, made.stream.seed) == (2, small.STAGES, 5)
    corpora = domains.of_text(settings["sources"], tokenizer.make(), domains.Packing(**settings["packing"]))
    trained = {name: rows.fingerprint for name, rows in zip(made.stream.sources, made.stream.rows, strict=True)}
    assert trained == {name: corpus.train.fingerprint for name, corpus in corpora.items()}
    assert made.held_out == {name: corpus.held_out.fingerprint for name, corpus in corpora.items()}
    batch = made.stream.at(0)
    output = Output(np.random.default_rng(0).normal(size=(*batch.targets.shape, 259)).astype("f"))
    assert setting.loss(output, batch) == losses.cross_entropy(output, batch, z_loss=0.1)
    assert setting.loss(output, batch) > losses.cross_entropy(output, batch)
    begun = toys.quick(setting.model.init)(key_for(5, "init"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made.create().params, begun)
    assert not np.array_equal(made.stream.index(0).row, other.stream.index(0).row)


def test_keys_are_derived_from_the_seed_and_the_step(folder, monkeypatch):
    """A method that remembers the keys that it is given."""

    def init(params):
        return TrainState(jnp.zeros((), jnp.int32), params, (), {"key": jnp.zeros(2, jnp.uint32)})

    def step(state, batch, key):
        return TrainState(state.step + 1, state.params, (), {"key": jax.random.key_data(key)}), {}

    def end_task(state, batch, key):
        return TrainState(state.step, state.params, (), {"key": jax.random.key_data(key)})

    monkeypatch.setattr(plan, "learner_of", lambda *rest: Method(init, step, end_task))
    settings = small.config(folder, seed=5, evaluation={"every": 4})
    made = program.build(**{**train.split(settings)[1], "mesh": {"devices": jax.devices()[:1]}})
    state, told = made.create(), []
    for i in range(3):
        state, _ = made.step(state, made.place(i))
        told.append(np.asarray(state.memory["key"]))
    told.append(np.asarray(made.end_task(state, made.place_task(0)).memory["key"]))
    wanted = [key_for(5, "step", i) for i in range(3)] + [key_for(5, "end_task", 3)]
    np.testing.assert_array_equal(told, [jax.random.key_data(key) for key in wanted])


def test_bits_per_byte_count_the_bytes_of_the_held_out_text(straight, folder):
    settings, _, _ = small.shared(folder)
    corpora = domains.of_text(settings["sources"], tokenizer.make(), domains.Packing(**settings["packing"]))
    size = {name: c.manifest["splits"]["held_out"] for name, c in corpora.items()}
    for record in small.records(straight, "eval"):
        for name, loss in record["loss"].items():
            bits = loss * size[name]["stored"] / size[name]["bytes"] / np.log(2)
            assert record["bits_per_byte"][name] == pytest.approx(bits, rel=1e-6)
    assert all(0.9 < x["bytes"] / x["stored"] < 0.999 for x in size.values())  # every document ends with a token


def test_no_key_of_the_environment_is_written_or_printed(folder, tmp_path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")
    assert stopped_at(folder, tmp_path / "run", 14) == 0
    assert go_on(folder, tmp_path / "run", small.config(folder, tensorboard=True)) == 0
    written = small.tree_of(tmp_path)
    assert {"run/run.json", "run/report.html", "run/checkpoints/24/MANIFEST"} <= set(written)
    assert any("tfevents" in name for name in written)
    assert not [name for name, data in written.items() if b"canary" in data]
    assert "canary" not in "".join(capfd.readouterr())


def test_every_task_is_closed_once_with_its_own_last_rows(folder, tmp_path):
    """The method gets them without those that were replayed: they belong to other tasks."""
    settings, own, made = small.shared(folder)
    closed = []

    def end_task(state, batch):
        closed.append((int(jax.device_get(state.step)), jax.device_get(batch)))
        return made.end_task(state, batch)

    with contextlib.closing(
        train.Session(made._replace(end_task=end_task), own, tmp_path / "run", settings)
    ) as session:
        session.train(lambda step: None)
    assert [step for step, _ in closed] == list(made.stream.boundaries)
    for stage, (end, batch) in enumerate(closed):
        steps = range(end - program.TASK_BATCHES, end)
        for i, expected in enumerate(made.stream.at(step) for step in steps):
            old = expected.extra["replayed"] > 0
            assert old.sum() == (2 if stage else 0)
            np.testing.assert_array_equal(batch.inputs[i], expected.inputs)
            np.testing.assert_array_equal(batch.weights[i][~old], expected.weights[~old])
            assert not batch.weights[i][old].any()


@pytest.mark.parametrize(
    ("name", "step", "method", "status"),
    [
        ("SIGTERM", 0, "evaluate", 0),  # before the first step: what is written for step 0 must not come twice
        ("SIGTERM", 11, "account", 0),  # step 12 is a checkpoint of its own
        ("SIGINT", 15, "account", 130),  # the step that ends a task
    ],
)
def test_a_signal_saves_and_the_same_command_continues(straight, folder, tmp_path, capsys, name, step, method, status):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, step, name=name, method=method) == status
    assert f"stopped by {name}: the state is saved in {workdir}" in capsys.readouterr().out
    assert small.checkpoint(workdir)[0] == step + (method == "account")
    assert not (workdir / "report.json").exists()
    where = step + (method == "account")
    assert small.events(workdir) == [(where, "stopped")]
    assert go_on(folder, workdir) == 0
    assert small.events(workdir) == [(where, "stopped"), (where, "restore")]
    assert small.outcome(workdir) == small.outcome(straight)


def test_a_launcher_names_the_status_of_a_run_that_it_stopped(straight, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCL_STOPPED", "75")
    assert stopped_at(folder, tmp_path / "run", 2) == 75
    assert go_on(folder, tmp_path / "run") == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)
    assert stopped_at(folder, tmp_path / "by hand", 2, name="SIGINT") == 130


@pytest.mark.parametrize("value", ["", "-1", "126", "one", "²", "1e1"])
def test_a_status_that_is_none_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch, value):
    monkeypatch.setenv("JAXCL_STOPPED", value)
    with pytest.raises(UserError, match=r"JAXCL_STOPPED=.*: must be an exit status, 0 to 125"):
        train.run(small.config(folder), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_signal_in_the_last_step_finishes_the_run(straight, folder, tmp_path):
    assert stopped_at(folder, tmp_path / "run", small.TOTAL - 1) == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)


def damage(workdir, step):
    """Flips a bit of the largest file of a checkpoint."""
    path = max((workdir / "checkpoints" / str(step)).rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_costs_time_and_nothing_else(straight, folder, tmp_path):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 13) == 0
    damage(workdir, 14)
    assert go_on(folder, workdir) == 0
    (event,) = small.records(workdir, "event")
    assert (event["step"], event["event"]) == (12, "restore")
    assert "checkpoint 14 is unusable" in event["message"]
    assert small.outcome(workdir) == small.outcome(straight)


def test_with_no_sound_checkpoint_nothing_is_touched(folder, tmp_path):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 5) == 0
    for step in (3, 6):
        damage(workdir, step)
    before = small.tree_of(workdir)
    with pytest.raises(UserError, match=r"no checkpoint can be read.*restore it from a copy"):
        go_on(folder, workdir)
    assert small.tree_of(workdir) == before


def nan_at(steps, times=10**6):
    """Returns a poison: the first `times` times that a batch of `steps` is placed, its weights are NaN."""
    seen = dict.fromkeys(steps, 0)

    def poison(step, batch):
        if step not in seen or seen[step] == times:
            return batch
        seen[step] += 1
        return dataclasses.replace(batch, weights=batch.weights * np.float32(np.nan))

    return poison


def test_one_bad_step_is_skipped(folder, straight, tmp_path):
    assert go_on(folder, tmp_path / "run", poison=nan_at([9])) == 0
    assert small.events(tmp_path / "run") == [(10, "skipped")]
    losses = {r["step"]: r["loss"] for r in small.records(tmp_path / "run", "train")}
    assert [step for step, loss in losses.items() if loss is None] == [10]
    good = {r["step"]: r["loss"] for r in small.records(straight, "train")}
    assert {s: losses[s] for s in range(1, 10)} == {s: good[s] for s in range(1, 10)}
    assert losses[11] != good[11]
    assert small.records(tmp_path / "run", "train")[-1]["guard/skipped"] == 1


def test_steps_that_turn_bad_for_once_are_done_again(folder, straight, tmp_path):
    settings = small.config(folder, rollback=3)
    assert go_on(folder, tmp_path / "run", settings, poison=nan_at([9, 10, 11], times=1)) == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)
    assert (9, "rollback") in small.events(tmp_path / "run")


def test_before_the_first_checkpoint_a_rollback_starts_anew(folder, straight, tmp_path):
    settings = small.config(folder, rollback=2)
    assert go_on(folder, tmp_path / "run", settings, poison=nan_at([0, 1], times=1)) == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)
    assert small.events(tmp_path / "run") == [(0, "rollback")]


def test_steps_that_stay_bad_end_the_run(folder, tmp_path, capsys):
    settings = small.config(folder, rollback=4)
    assert go_on(folder, tmp_path / "run", settings, poison=nan_at(range(10, small.TOTAL))) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "lower config.schedule.peak" in lines[0]
    assert [event for _, event in small.events(tmp_path / "run")].count("rollback") == 1
    assert not (tmp_path / "run" / "report.json").exists()


def edited(folder, stage, **changes):
    settings = copy.deepcopy(small.config(folder))
    settings["stream"]["stages"][stage].update(changes)
    return settings


def test_a_future_stage_may_be_edited(folder, straight, tmp_path):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 10) == 0
    past = small.records(workdir)
    settings = edited(folder, 2, mixture={"d0": 0.5, "d2": 0.5}, steps=4)
    assert go_on(folder, workdir, settings) == 0
    assert small.records(workdir)[: len(past)] == past
    assert small.checkpoint(workdir)[0] == 20
    assert small.records(workdir) != small.records(straight)


@pytest.mark.parametrize(
    "changes", [{"mixture": {"d1": 1.0}}, {"steps": 7}, {"replay": {"fraction": 0.5, "over": "seen"}}]
)
def test_a_past_stage_may_not(folder, tmp_path, changes):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 10) == 0
    before = small.tree_of(workdir)
    with pytest.raises(UserError, match=r"the rows before step 11 are not those.*past stage"):
        go_on(folder, workdir, edited(folder, 0, **changes))
    assert small.tree_of(workdir) == before


def test_a_finished_run_goes_on_with_another_stage(folder, straight, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    past = small.records(workdir)
    settings = small.config(folder)
    settings["stream"]["stages"].append({"name": "again", "mixture": {"d0": 1.0}, "steps": 2})
    assert go_on(folder, workdir, settings) == 0
    assert small.records(workdir)[: len(past)] == past
    assert [r["step"] for r in small.records(workdir, "train")][-2:] == [25, 26]


def test_a_second_process_on_the_same_folder_is_refused_and_changes_nothing(folder, tmp_path):
    workdir = tmp_path / "run"
    assert stopped_at(folder, workdir, 5) == 0
    with train.folder.locked(workdir):
        before = small.tree_of(workdir)
        with pytest.raises(UserError, match=r"--workdir=.*another process trains there; wait for it"):
            go_on(folder, workdir)
        assert small.tree_of(workdir) == before
    assert go_on(folder, workdir) == 0


def test_a_folder_that_was_only_locked_is_gone_again(tmp_path):
    with contextlib.suppress(ValueError), train.folder.locked(tmp_path / "run"):
        assert (tmp_path / "run").exists()
        raise ValueError
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_finite_from_the_start_ends_the_run(folder, tmp_path, capsys, monkeypatch):
    _, _, made = small.shared(folder)
    nan = made._replace(evaluate=lambda params: {"loss": {"d0": float("nan")}, "bits_per_byte": {"d0": float("nan")}})
    monkeypatch.setattr(train.program, "build", lambda **pieces: nan)
    monkeypatch.setattr(train, "split", lambda config: (small.shared(folder)[1], {}))
    assert train.run(small.config(folder), str(tmp_path / "run")) == 3
    assert "the loss on d0 is not finite before the first step" in capsys.readouterr().err


def test_a_model_that_is_not_finite_at_the_end_of_a_stage_ends_the_run(folder, tmp_path, capsys, monkeypatch):
    _, _, made = small.shared(folder)
    calls = []

    def evaluate(params):
        calls.append(params)
        loss = {"d0": 1.0 if len(calls) <= 2 else float("nan")}  # before the first step, and within the first stage
        return {"loss": loss, "bits_per_byte": loss}

    monkeypatch.setattr(train.program, "build", lambda **pieces: made._replace(evaluate=evaluate))
    monkeypatch.setattr(train, "split", lambda config: (small.shared(folder)[1], {}))
    assert train.run(small.config(folder), str(tmp_path / "run")) == 3
    assert "the loss on d0 is not finite at the end of a stage; lower config.schedule.peak" in capsys.readouterr().err
    assert len(calls) == 4  # once more from the checkpoint before


def test_a_run_may_be_renamed(folder, straight, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    assert go_on(folder, workdir, small.config(folder, label="another name")) == 0
    assert json.loads((workdir / "report.json").read_text())["label"] == "another name"


def test_a_run_may_go_on_with_another_implementation_of_attention(folder, straight, tmp_path):
    assert stopped_at(folder, tmp_path / "run", 10) == 0
    assert go_on(folder, tmp_path / "run", small.config(folder, model__attention="tiles")) == 0
    assert small.outcome(tmp_path / "run") == small.outcome(straight)
    with pytest.raises(UserError, match=r"config\.model\.layers=1, not 2"):
        go_on(folder, tmp_path / "run", small.config(folder, model__layers=2))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(folder, tmp_path, capsys, monkeypatch):
    def full(*rest):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint.manifests, "fingerprint", full)
        assert go_on(folder, tmp_path / "run") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "checkpoint 3 in" in line
    assert "No space left on device; mend that, and the same command continues" in line
    assert go_on(folder, tmp_path / "run") == 0


@pytest.mark.parametrize(("status", "order"), [(0, ["train", "report", "leave"]), (75, ["train", "leave"])])
def test_a_run_leaves_its_company_once_all_is_done(tmp_path, monkeypatch, status, order):
    done = []
    monkeypatch.setattr(train, "split", lambda config: (None, {}))
    monkeypatch.setattr(train.program, "build", lambda: None)
    monkeypatch.setattr(train, "supervise", lambda *rest: done.append("train") or status)
    monkeypatch.setattr(train.folder, "about", lambda place: {"finished": True})
    monkeypatch.setattr(train.report, "write", lambda places: done.append("report"))
    monkeypatch.setattr(distributed, "shutdown", lambda: done.append("leave"))
    assert train.run({}, str(tmp_path / "run"), final=False) == status
    assert done == order


def test_without_its_company_a_process_waits_for_no_save(tmp_path, monkeypatch, capsys):
    """The save under way never ends: it waits for the one that is gone."""

    def lose(stopped):
        raise jax.errors.JaxRuntimeError("INTERNAL: [Gloo] Connection closed by peer")

    def leave(status):
        done.append(status)
        raise SystemExit  # nothing goes on after os._exit; here the blocks are left

    done = []
    watch = types.SimpleNamespace(attempt=lambda *rest: contextlib.nullcontext())
    session = types.SimpleNamespace(watch=watch, train=lose, close=lambda: done.append("wait"))
    monkeypatch.setattr(train, "Session", lambda *rest: session)
    monkeypatch.setattr(distributed, "together", lambda action: action())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.os, "_exit", leave)
    with pytest.raises(SystemExit):
        train.supervise(None, None, tmp_path / "run", {}, None, 0.0)
    assert done[0] == 4
    assert "another process or its machine is gone" in capsys.readouterr().err


def test_the_vocabulary_of_a_preset_yields_to_the_tokenizer_and_one_that_was_set_does_not():
    words = tokenizer.make()._replace(vocab=601)
    made = network.make({"name": "transformer", "preset": "tiny"}, words, 16)
    shapes = jax.eval_shape(made.model.init, jax.random.key(0))
    assert shapes["embedding"].shape[0] == 608
    with pytest.raises(UserError, match=r"config.model.vocab=264: smaller than.*set config.model.vocab=608"):
        network.make({"name": "transformer", "preset": "tiny", "vocab": 264}, words, 16)
