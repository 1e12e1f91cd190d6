"""The loop: one for every method. All side effects of a run happen here."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxcl import allocator, checkpoint, distributed, folder, frozen, mesh, metrics, program, progress, report, schema
from jaxcl import feed as feeds
from jaxcl import watch as watches
from jaxcl.data.archive import Archive
from jaxcl.report import terminal
from jaxcl.ridge import learner
from jaxcl.types import Batch, TrainState

Stop = Callable[[int], str | None]  # step -> why to stop after it, or None


class Loop(NamedTuple):
    """What the loop itself is told by a config file, besides the keys of `jaxcl.program.build`."""

    label: str = "run"  # name of the run in reports
    checkpoint: dict[str, Any] | None = None  # see `jaxcl.checkpoint.Checkpoints`
    rollback: int = 8  # bad steps in a row after which the last checkpoint is restored
    tensorboard: bool = True
    wandb: str | None = None  # project
    watch: dict[str, Any] | None = None  # see `jaxcl.watch.Watch`


class Stopped(Exception):
    """A signal asked the run to stop; the state is saved. The argument names the signal."""

    cause = property(str)  # the signal


class BadSteps(Exception):
    """Too many bad steps in a row."""

    cause = "bad steps"


class Session:
    """One process's part of a run, from its last checkpoint to the end."""

    def __init__(self, made: program.Program, loop: Loop, place: Path, config: Mapping[str, Any]):
        """Restores, and only then writes to `place`: what is refused leaves it as it was."""
        self.made, self.loop, self.place = made, loop, place
        self.checkpoints = schema.call(
            checkpoint.Checkpoints, loop.checkpoint or {}, place / "checkpoints", made.base, field="checkpoint"
        )
        self.watch = watches.Watcher(schema.call(watches.Watch, loop.watch or {}, field="watch"), place)
        self.state: TrainState
        self.step = 0
        self.ledger: dict[str, dict[str, int]] = {}
        self.pending: tuple[int, Mapping[str, Any]] | None = None
        self.clock = time.perf_counter()
        self.fresh = self.rolled_back = False
        self.saved: int | None = None  # step of the newest checkpoint
        self.records = 0  # in metrics.jsonl, as `metrics.count` has it; kept by process 0
        self.feed: feeds.Feed | None = None
        self.noted = False  # whether it was said why an answer could not be judged
        self.held: feeds.Held = feeds.Held()  # of the feed, as the checkpoint has it
        self.archive: Archive | None = None
        if made.stream.contents:
            who = {"process": jax.process_index(), "processes": jax.process_count()}
            self.archive = Archive(str(place / "reservoir"), made.stream, **who)
        message = folder.moved(place, config, self.restore())
        distributed.together(lambda: folder.claim(place, config, made.facts))  # before anything else is written there
        self.rewind()
        self.out = metrics.Several(self.writers())
        if message:
            self.event("restore", message)

    def writers(self) -> list[metrics.Writer]:
        """Returns where the records of this process go: process 0 writes, the others are silent."""
        if jax.process_index():
            return []
        stages = [stage.name for stage in self.made.stream.stages]
        out: list[metrics.Writer] = [metrics.Jsonl(self.place / "metrics.jsonl")]
        if self.loop.tensorboard:
            out.append(metrics.TensorBoard(self.place / "tensorboard", resume_step=self.step or None))
        if self.loop.wandb:
            about = folder.about(self.place)
            out.append(metrics.Wandb(self.place, project=self.loop.wandb, run_id=about["id"], config=about["config"]))
        steps, unit = self.made.stream.total_steps, self.made.facts["unit"]
        return [*out, progress.Progress(steps, stages, start=self.step, unit=unit)]

    def restore(self) -> str | None:
        """Takes the newest sound checkpoint, or a fresh state; returns what there is to say about it.

        Raises:
          UserError: the corpus, the seed or a past stage is not what the checkpoint was trained on, or the reservoir
            is not what it was then, or metrics.jsonl lacks records.
        """
        found = self.checkpoints.restore(feeds.with_ahead(self.made.abstract, self.made.rollouts))
        self.fresh = found is None
        if found is None:
            self.step, self.state, self.saved, self.held = 0, self.made.create(), None, feeds.Held()
            zero: dict[str, int] = dict.fromkeys(("new_rows", "new_tokens", "replayed_rows", "replayed_tokens"), 0)
            self.ledger = {source: dict(zero) for source in self.made.stream.sources}
            message = None
        else:
            now = {"stream": self.made.stream.fingerprint(found.step), "held_out": self.made.held_out}
            folder.check_data(self.place, found.step, found.host, now)
            self.step, self.ledger = found.step, found.host["ledger"]
            self.state, self.held = feeds.unpacked(found.state, found.host.get("feed"))
            self.saved = found.step
            message = found.message or f"continues from step {found.step}"
        if self.archive:
            distributed.together(functools.partial(self.archive.check, self.step))
        distributed.together(functools.partial(self.remember, found and found.host.get("records")))
        if not jax.process_index():
            cut = metrics.truncate(self.place / "metrics.jsonl", self.step if found else -1)
            message = "no checkpoint found: starts from the beginning" if cut and not found else message
        self.clock = time.perf_counter()
        return message

    def remember(self, wanted: int | None) -> None:
        """Counts the records up to the present step; `wanted` is their number when the checkpoint was saved."""
        if not jax.process_index():
            self.records = metrics.history(self.place / "metrics.jsonl", -1 if self.fresh else self.step, wanted)

    def rewind(self) -> None:
        """Brings the reservoir back to the present step."""
        if self.archive:
            distributed.together(functools.partial(self.archive.open, self.step))

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step; called in order, by the feeder."""
        return self.made.place(step, self.archive.at(step)) if self.archive else self.made.place(step)

    def train(self, stopped: Stop) -> None:
        """Trains to the end of the stream; rolls back once if steps stay bad.

        Raises:
          Stopped: after a signal, once the state is saved.
          BadSteps: steps stay bad after a rollback.
        """
        while True:
            try:
                return self.run_steps(stopped)
            except watches.Repeat as again:
                self.back(f"{again}: is it the machine or the data?")
            except BadSteps as bad:
                if self.rolled_back:
                    raise
                self.rolled_back = True
                self.back(str(bad))

    def back(self, why: str) -> None:
        """Goes on from the last checkpoint."""
        self.pending = None
        self.out.close()  # before the records after the checkpoint are cut off
        self.restore()
        self.rewind()
        self.watch.back()
        self.out = metrics.Several(self.writers())
        self.event("rollback", f"{why}; back to step {self.step}")

    def run_steps(self, stopped: Stop) -> None:
        """Trains from the present step to the end of the stream."""
        flow = self.made.stream
        if self.fresh:
            self.evaluate(boundary=-1)
            if self.made.imported:  # once: no later start reads the files it came from
                self.save()
        self.feed = feeds.Feed(self.batch, self.made.rollouts, self.step, flow, self.held)
        with contextlib.closing(self.feed), jax.transfer_guard("disallow"):
            while self.step < flow.total_steps:
                if reason := stopped(self.step):
                    self.flush()
                    self.event("stopped", f"by {reason}")
                    self.save()
                    raise Stopped(reason)
                self.watch.profile(self.step)
                rows, told = self.feed.get(self.state)
                self.state, values = self.made.step(self.state, rows)
                self.account(self.step)
                self.step += 1
                self.flush()  # the step before: by now its metrics are there, and the device is busy with this one
                self.watch.compare(self.step, self.state)
                self.feed.settle()
                if (note := told.pop("note", None)) and not self.noted:
                    self.noted = True
                    self.event("verifier", f"an answer could not be judged: {note}")
                self.pending = (self.step, values | told)
                if self.step in flow.boundaries:
                    self.end_task(flow.boundaries.index(self.step))
                elif self.step % self.made.evaluate_every == 0:
                    self.evaluate()
                if self.checkpoints.due(self.step):
                    self.save()
        self.save()

    def end_task(self, stage: int) -> None:
        """Lets the method close the task, then evaluates every domain."""
        self.flush()
        self.state = self.made.end_task(self.state, self.task_rows(stage))
        self.evaluate(boundary=stage)

    def task_rows(self, stage: int) -> Batch:
        """Returns the last batches of a task, stacked."""
        first = self.made.stream.boundaries[stage] - 1
        if self.made.rollouts is None or not self.made.rollouts.learns(first):
            return self.made.place_task(stage)
        assert self.feed
        rows = self.feed.task(self.state, program.last_steps(self.made.stream, stage))
        with jax.transfer_guard("allow"):
            return jax.tree.map(lambda *x: jax.numpy.stack(x), *rows)

    def account(self, step: int) -> None:
        """Enters the rows of a step into the ledger."""
        for source, counts in self.made.stream.account(step).items():
            for key, value in counts.items():
                self.ledger[source][key] += value

    def flush(self) -> None:
        """Writes the metrics of the last step that has been dispatched before.

        Raises:
          BadSteps: the guard has skipped too many steps in a row.
        """
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        dispatched = time.perf_counter()
        fetched = {name: float(value) for name, value in mesh.fetch(values).items()}
        times = {name[5:]: fetched.pop(name) for name in list(fetched) if name.startswith("time/")}
        now = time.perf_counter()
        seconds, busy, self.clock = now - self.clock, dispatched - self.clock, now
        stage = self.made.stream.stage_of(step - 1)
        # Targets trained on, replayed ones too, or tokens drawn; not padding or context.
        tokens = fetched.get("drawn", fetched["weight"]) / seconds
        share = self.made.utilisation(tokens)
        speed = {"step_s": seconds, "tokens_per_s": tokens, **times} | ({} if share is None else {"mfu": share})
        about = {"task": stage, "stage": self.made.stream.stages[stage].name}
        self.write({"kind": "train", "step": step, **about, **fetched, "time": speed})
        if fetched.get("guard/consecutive", 0) >= 1:
            gave = f"loss {fetched['loss']:.3g}, gradient norm {fetched['grad_norm']:.3g}"
            self.event("skipped", gave, step, rows=self.made.stream.named_rows(step - 1))
        self.watch.took(step, seconds, busy, fetched)
        for where, message in self.watch.told():
            self.event("repeated", message, where)
        if fetched.get("guard/consecutive", 0) >= self.loop.rollback:
            which = f"steps {step - self.loop.rollback + 1} to {step} were all skipped (loss {fetched['loss']:.3g})"
            raise BadSteps(f"{which}; lower config.schedule.peak, or look at these rows")

    def evaluate(self, boundary: int | None = None) -> None:
        """Evaluates every domain and writes the result and the ledger; at a boundary, also their alignment."""
        self.flush()
        began = time.perf_counter()
        params = frozen.whole(self.state)
        with self.watch.spending("evaluation"):
            scores = self.made.evaluate(params)
        spent = {"seconds": time.perf_counter() - began} | self.watch.busiest()
        bad = [name for name, loss in scores["loss"].items() if not math.isfinite(loss)]
        if boundary is not None and bad:
            what = "at the end of a stage; lower config.schedule.peak, or look at config.method and config.adapter"
            start = "before the first step; look at config.model, its checkpoint and config.adapter"
            raise BadSteps(f"the loss on {bad[0]} is not finite {start if boundary == -1 else what}")
        if boundary is not None and self.made.compare:
            with self.watch.spending("evaluation"):
                scores = scores | self.made.compare(params)
            took = time.perf_counter() - began - spent["seconds"]
            spent["alignment_s" if "alignment" in scores else "modes_s"] = took
        task = self.made.stream.stage_of(self.step - 1) if self.step else -1
        about = {"step": self.step, "task": task, "boundary": boundary}
        about |= learner.solved(self.state.memory) if boundary not in (None, -1) else {}
        self.write({"kind": "eval", **about, **scores, "time": spent})
        if text := learner.inexact(about):
            self.event("inexact", text)
        self.write({"kind": "ledger", "step": self.step, "sources": self.ledger})
        self.clock = time.perf_counter()

    def save(self) -> None:
        """Saves the state unless it is saved, after everything that was written about it is on disk."""
        self.flush()
        if self.saved == self.step:
            return
        self.watch.compare(self.step, self.state, now=True)
        self.out.sync()
        past = self.made.stream.fingerprint(self.step)
        host = {"ledger": self.ledger, "stream": past, "held_out": self.made.held_out, "records": self.records}
        state, own = feeds.packed(self.state, self.made.rollouts, self.feed.held if self.feed else self.held)
        with self.watch.spending("save"):
            self.checkpoints.save(self.step, state, host | own)
        if self.archive:
            self.archive.release(min(self.checkpoints.steps(), default=0))
        self.saved = self.step
        self.watch.saved(self.step)
        self.warn()
        self.clock = time.perf_counter()

    def write(self, record: metrics.Record) -> None:
        """Writes a record that a run without interruption has too."""
        self.out.write(record)
        self.records += 1

    def event(self, name: str, message: str, step: int | None = None, **more: Any) -> None:
        """Writes an event."""
        where = self.step if step is None else step
        self.out.write({"kind": "event", "step": where, "event": name, "message": message, **more})

    def warn(self) -> None:
        """Writes what was wrong with copies of checkpoints."""
        for text in self.checkpoints.warnings():
            self.event("checkpoint", text)

    def close(self) -> None:
        """Waits for the last checkpoint and closes the files."""
        self.checkpoints.wait()
        self.warn()
        self.out.close()
        if self.archive:
            self.archive.close()


def run(config: Mapping[str, Any], workdir: str, *, final: bool = True) -> int:
    """Trains what `config` describes in `workdir`, from its last checkpoint if there is one, and writes the report.

    Returns the exit status: 0 finished; 0 or JAXCL_STOPPED stopped by SIGTERM with the state saved, 130 by Ctrl-C; 1 a
    checkpoint could not be written; 3 training cannot go on; 4 a fault of the machine (see `jaxcl.watch`).

    Args:
      config: the keys of `Loop` and of `jaxcl.program.build`.
      workdir: folder of the run.
      final: whether to print the table of results at the end.

    Raises:
      UserError: bad input, before anything is written.
    """
    loop, pieces = split(config)
    place, began = Path(workdir), time.time()
    if distributed.initialize():
        distributed.agree(workdir=str(place.absolute()), config=config)
    if jax.default_backend() == "cpu":
        allocator.keep_pages()
    status = 0
    if folder.finished(place, config):
        print(f"{place}: finished before")
    else:
        with distributed.stop_on_signal() as stopped:
            status = supervise(program.build(**pieces), loop, place, config, stopped, began)
    if status == 0 and folder.about(place)["finished"] and jax.process_index() == 0:
        results = report.write([str(place)])
        if final:
            terminal.show(results, place / "report.html")
    distributed.shutdown()
    return status


def supervise(
    made: program.Program, loop: Loop, place: Path, config: Mapping[str, Any], stopped: Stop, began: float
) -> int:
    """Trains to the end and returns the exit status."""
    try:
        with distributed.leaving(watches.MACHINE), contextlib.ExitStack() as stack:
            distributed.together(lambda: stack.enter_context(folder.locked(place)))
            session = stack.enter_context(contextlib.closing(Session(made, loop, place, config)))
            stack.enter_context(distributed.leaving(watches.MACHINE))  # before the save under way is waited for
            with session.watch.attempt(began, lambda: session.step):
                session.train(stopped)
    except Stopped as reason:
        print(f"stopped by {reason}: the state is saved in {place}; the same command continues", flush=True)
        return 130 if str(reason) == "SIGINT" else distributed.stopped_status()
    except (BadSteps, watches.MachineFault) as bad:
        print(f"error: {bad}", file=sys.stderr)
        return 3 if isinstance(bad, BadSteps) else watches.MACHINE
    except checkpoint.NotSaved as error:
        text = " ".join(str(error).split())[:400]
        print(f"error: {text}; mend that, and the same command continues from the checkpoint before", file=sys.stderr)
        return 1
    folder.finish(place)
    return 0


def split(config: Mapping[str, Any]) -> tuple[Loop, dict[str, Any]]:
    """Returns the loop's part of a config, and the keyword arguments of `jaxcl.program.build`.

    Raises:
      UserError: unknown or missing key, a value of the wrong type, or a missing package.
    """
    own = {key: value for key, value in config.items() if key in Loop._fields}
    rest = {key: value for key, value in config.items() if key not in Loop._fields}
    loop = schema.call(Loop, own, field="")
    schema.check(program.build, rest, field="")
    if loop.rollback < 1:
        raise schema.UserError(f"config.rollback={loop.rollback}: must be at least 1 bad step")
    if loop.wandb:
        metrics.wandb_client()
    return loop, rest
