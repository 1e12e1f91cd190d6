"""Blurred streams: the authors' lists to the last index, what must hold for every seed, and one pass through a run."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl import schema
from jaxcl.data import blurred, scenarios, stream, tabular
from jaxcl.schema import UserError

QUICK = True
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "blurred" / "tasks.json").read_text())


def digest(rows):
    return hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: "-".join(map(str, case["part"].values())))
def test_rows_are_those_of_the_authors_sampler(case):
    """Recorded with torch's generator, see experiments/fixtures/blurred.py."""
    labels = np.random.RandomState(case["labels"]["seed"]).randint(0, case["labels"]["classes"], case["labels"]["rows"])
    part = blurred.Part(0, **case["part"])
    found = blurred.rows_of(labels, part)
    assert [len(rows) for rows in found] == case["sizes"]
    assert [rows[:5].tolist() for rows in found] == case["first"]
    assert [digest(rows) for rows in found] == case["sha256"]
    disjoint, blurry = blurred.classes_of(case["labels"]["classes"], part)
    assert [[c.tolist() for c in kind] for kind in (disjoint, blurry)] == [case["disjoint"], case["blurry"]]


PARTS = st.builds(
    blurred.Part,
    st.just(0),
    tasks=st.integers(1, 6),
    disjoint=st.integers(0, 100),
    blurry=st.integers(0, 100),
    seed=st.integers(0, 2**32 - 1),
)


@given(PARTS, st.lists(st.integers(1, 30), min_size=1, max_size=24))
def test_nothing_is_lost_or_comes_twice_and_disjoint_classes_stay_in_their_task(part, counts):
    labels = np.random.default_rng(len(counts)).permutation(np.repeat(np.arange(len(counts)), counts))
    tasks, (disjoint, blurry) = blurred.rows_of(labels, part), blurred.classes_of(len(counts), part)
    assert len(tasks) == part.tasks
    assert [len(rows) for rows in tasks] == blurred.sizes(counts, part)  # whatever the order of the rows
    used = np.concatenate([*disjoint, *blurry])
    assert len({*used.tolist()}) == len(used)
    assert len(used) > len(counts) - 2 * part.tasks  # the remainders of both kinds
    every = np.concatenate(tasks)
    assert sorted(every.tolist()) == np.flatnonzero(np.isin(labels, used)).tolist()
    for own, rows in zip(disjoint, tasks, strict=True):
        for label in own:
            assert np.isin(np.flatnonzero(labels == label), rows).all()
    strays = sum(
        int((~np.isin(labels[rows], np.concatenate([a, b]))).sum())
        for a, b, rows in zip(disjoint, blurry, tasks, strict=True)
    )
    assert strays <= np.isin(labels, np.concatenate(blurry)).sum() * part.blurry // 100


def test_a_scenario_is_one_pass_over_rows_that_sources_agree_on():
    source = {"name": "digits", "count": 400, "held_out": 60, "size": 8}
    sources, stages = scenarios.si_blurry(source, [40] * 10, 3, batch=7, disjoint=60, blurry=25, seed=2)
    tables = {n: schema.make("jaxcl.data.sources", one, field=n) for n, one in sources.items()}
    whole = schema.make("jaxcl.data.sources", source, field="x")
    key = [row.tobytes() for row in whole.train["inputs"]]
    came = [[key.index(row.tobytes()) for row in table.train["inputs"]] for table in tables.values()]
    wanted = blurred.rows_of(whole.train["targets"], blurred.Part(0, 3, 60, 25, 2))
    assert came == [sorted(rows.tolist()) for rows in wanted]
    assert [table.train["targets"].tolist() for table in tables.values()] == [
        whole.train["targets"][rows].tolist() for rows in came
    ]
    for task, (a, b) in enumerate(zip(*blurred.classes_of(10, blurred.Part(0, 3, 60, 25, 2)), strict=True)):
        own = blurred.own_classes(10, blurred.Part(task, 3, 60, 25, 2))
        assert own.tolist() == sorted([*a.tolist(), *b.tolist()])
    held = [{*table.held_out["targets"].tolist()} for table in tables.values()]
    assert [len(a & b) for a, b in ((held[0], held[1]), (held[0], held[2]), (held[1], held[2]))] == [0, 0, 0]
    assert sum(len(table.held_out["targets"]) for table in tables.values()) == 6 * len(set.union(*held))
    flow = stream.make({n: tabular.corpus(table).train for n, table in tables.items()}, stages, batch=7)
    assert [stage.steps for stage in flow.stages] == [len(rows) // 7 for rows in wanted]
    for name, taken in flow.consumed(flow.total_steps).items():  # no row comes twice
        assert 0 <= len(tables[name].train["targets"]) - taken < 7


def test_classes_are_known_to_have_come_at_the_step_of_their_first_row():
    source = {"name": "digits", "count": 200, "held_out": 20, "size": 8}
    sources, stages = scenarios.si_blurry(source, [20] * 10, 2, batch=4, disjoint=40, blurry=30, seed=5)
    corpora = {n: tabular.corpus(schema.make("jaxcl.data.sources", one, field=n)) for n, one in sources.items()}
    flow = stream.make({n: corpus.train for n, corpus in corpora.items()}, stages, batch=4)
    wanted = {name: {} for name in sources}
    for step in range(flow.total_steps):
        index = flow.index(step)
        for k, row in zip(index.source, index.row, strict=True):
            name = flow.sources[k]
            wanted[name].setdefault(int(corpora[name].train.labels[row]), step + 1)
    assert flow.arrivals() == wanted
    assert len({*wanted["task_00"]} & {*wanted["task_01"]}) > 0
    short = stream.make({n: corpus.train for n, corpus in corpora.items()}, [{**stages[0], "steps": 1}], batch=4)
    assert sum(map(len, short.arrivals().values())) == len({*short.at(0).targets.tolist()})


def test_streams_that_cannot_be_are_refused():
    source = {"name": "digits", "count": 100, "held_out": 20, "size": 8}
    alone = zip(*blurred.classes_of(10, blurred.Part(0, tasks=10, seed=3)), strict=True)
    without = next(t for t, (a, b) in enumerate(alone) if not len(a) + len(b))
    cases = [
        ("si_blurry.task=5: must be from 0 to 4", {"task": 5}),
        ("si_blurry.disjoint=101: must be from 0 to 100", {"task": 0, "disjoint": 101}),
        ("si_blurry.blurry=-1", {"task": 0, "blurry": -1}),
        ("si_blurry.seed=-1", {"task": 0, "seed": -1}),
        ("si_blurry.tasks=0", {"task": 0, "tasks": 0}),
        ("si_blurry.task: missing", {}),
        ("si_blurry.tusk: unknown key; did you mean 'task'", {"tusk": 0}),
        (r"si_blurry.rows=7: task 0 has \d+; give the counts", {"task": 0, "tasks": 2, "rows": 7}),
        (f"leaves task {without} without a class of its own", {"task": without, "tasks": 10, "seed": 3}),
    ]
    for words, options in cases:
        with pytest.raises(UserError, match=words) as error:
            schema.make("jaxcl.data.sources", {**source, "si_blurry": options}, field="sources.x")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="leave classes out"):
        schema.make("jaxcl.data.sources", {**source, "classes": [1], "si_blurry": {"task": 0}}, field="sources.x")
    with pytest.raises(UserError, match=r"task \d has \d+ rows, less than a batch of 50"):
        scenarios.si_blurry(source, [10] * 10, 2, batch=50)
    with pytest.raises(UserError, match="without a class of its own"):
        scenarios.si_blurry(source, [10] * 10, 10, batch=1, seed=3)
