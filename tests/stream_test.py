"""The stream: exact mixtures, epochs, replay and accounting; a pure function of the step on any number of hosts."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.data import mixture, rows
from jaxcl.data.permutation import fold_in, key_of, mix, permute
from jaxcl.data.stream import Stage, make
from jaxcl.schema import UserError

LENGTH = 8
SIZES = {"a": 23, "b": 41, "c": 67}
FEW = settings(max_examples=25, deadline=None)


def table(count, number=0, seed=0):
    """Rows whose first token names the source and whose second names the row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1000, (count, LENGTH + 1)).astype(np.uint32)
    tokens[:, 0], tokens[:, 1] = number, np.arange(count)
    starts = rng.random(tokens.shape) < 0.2
    starts[:, :2] = False
    return rows.from_words(rows.pack(tokens, starts, np.full(count, LENGTH + 1)), LENGTH)


ROWS = {name: table(size, i) for i, (name, size) in enumerate(SIZES.items())}
STAGES = [Stage("x", 30, {"a": 1, "b": 1}), Stage("y", 40, {"b": 0.1, "c": 0.9}), Stage("z", 50, {"a": 0.5, "c": 0.5})]


def stream(stages=STAGES, batch=6, seed=3, table=ROWS, **options):
    return make(table, stages, batch=batch, seed=seed, **options)


def new_rows(s, steps):
    out = []
    for step in steps:
        index = s.index(step)
        keep = (index.source >= 0) & ~index.replayed
        out += list(zip(index.source[keep].tolist(), index.row[keep].tolist(), strict=True))
    return out


def leaves(batch):
    names = ("inputs", "targets", "weights", "segments", "positions", "task")
    return {name: getattr(batch, name) for name in names} | batch.extra


def assert_equal(a, b):
    for name, value in leaves(a).items():
        np.testing.assert_array_equal(value, leaves(b)[name], err_msg=name)


@FEW
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size, key):
    out = permute(np.arange(size), size, key)
    np.testing.assert_array_equal(np.sort(out), np.arange(size))


def test_permutation_is_uniform_and_keys_are_independent():
    keys = fold_in(key_of("seed"), np.arange(6000))
    for place in (0, 5, 11):
        counts = np.bincount(permute(np.full(6000, place), 12, keys), minlength=12)
        assert ((counts - 500) ** 2 / 500).sum() < 31.3  # chi-square, 11 degrees of freedom, p = 0.001
    a, b = permute(np.arange(4000), 4000, keys[0]), permute(np.arange(4000), 4000, keys[1])
    assert (a == b).sum() < 12  # two random orders agree in about one place
    assert (np.diff(a) == 1).sum() < 12  # neighbours do not stay neighbours


def test_permutation_of_huge_tables_and_hash_reference():
    size = 10**13 + 7
    out = permute(np.array([0, 1, size - 1]), size, 5)
    assert ((out >= 0) & (out < size)).all()
    assert len(set(out.tolist())) == 3

    def slow(x):  # SplitMix64 finaliser in Python integers
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    values = [0, 1, 2**63, 2**64 - 1]
    assert mix(np.array(values, np.uint64)).tolist() == [slow(v) for v in values]


@FEW
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=7), st.integers(1, 400))
def test_mixture_holds_at_every_prefix(weights, n):
    m = mixture.make({k: Fraction(w, 1000) for k, w in enumerate(weights)})
    source, before = mixture.locate(m, np.arange(n))
    share = np.array(weights) / sum(weights)
    seen = Counter()
    for i in range(n):
        assert before[i] == seen[source[i]]
        seen[source[i]] += 1
        assert all(abs(seen[k] - share[k] * (i + 1)) < 2 for k in range(len(weights)))
    np.testing.assert_array_equal(mixture.counts(m, n, len(weights)), [seen[k] for k in range(len(weights))])


@FEW
@given(st.integers(1, 25), st.integers(0, 5), st.floats(0, 0.8), st.sampled_from(["replace", "extend"]))
def test_every_row_once_per_epoch(batch, seed, fraction, mode):
    s = stream(batch=min(batch, 20), seed=seed, replay={"fraction": round(fraction, 3), "mode": mode})
    orders = {name: [] for name in s.sources}
    for source, row in new_rows(s, range(s.total_steps)):
        orders[s.sources[source]].append(row)
    assert {name: len(order) for name, order in orders.items()} == s.consumed(s.total_steps)
    for name, order in orders.items():
        epochs = [order[i : i + SIZES[name]] for i in range(0, len(order), SIZES[name])]
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(SIZES[name]))
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert all(a != b for a, b in itertools.pairwise(epochs))  # shuffled anew


@FEW
@given(
    st.integers(1, 30), st.floats(0, 0.9), st.sampled_from(["replace", "extend"]), st.sampled_from(["earlier", "seen"])
)
def test_a_later_stage_does_not_change_the_past(steps, fraction, mode, over):
    options = {"replay": {"fraction": round(fraction, 3), "mode": mode, "over": over}}
    full = stream(**options)
    more = {**ROWS, "0new": table(90, 9)}
    edited = stream(
        [STAGES[0], STAGES[1]._replace(steps=steps), Stage("w", 9, {"0new": 2, "a": 1})], table=more, **options
    )
    for step in (0, 29, 30, 30 + steps - 1):
        a, b = full.at(step), edited.at(step)
        assert_equal(a, b)
    end = 30 + steps
    assert full.fingerprint(end) == edited.fingerprint(end)
    assert full.fingerprint(end + 1) != edited.fingerprint(end + 1)


def test_fingerprint_sees_content_seed_and_past_stages():
    base = stream().fingerprint(35)
    assert stream().fingerprint(35) == base
    assert stream(table={**ROWS, "a": table(23, 0, seed=1)}).fingerprint(35) != base
    assert stream(seed=4).fingerprint(35) != base
    assert stream([STAGES[0]._replace(steps=29), *STAGES[1:]]).fingerprint(35) != base
    assert stream(replay={"fraction": 0.1}).fingerprint(35) != base
    sizes = [stream(replay={"fraction": 0.1, "over": "reservoir", "capacity": n}).fingerprint(35) for n in (8, 9)]
    assert sizes[0] != sizes[1]
    assert stream(replay={"fraction": 0.1}).fingerprint(30) == stream().fingerprint(30)
    assert stream(table=dict(reversed(ROWS.items()))).fingerprint(35) == base


@pytest.mark.parametrize(
    ("fraction", "mode", "over"),
    [(0.25, "replace", "earlier"), (0.05, "replace", "seen"), (0.5, "extend", "earlier"), (0.3, "extend", "seen")],
)
def test_replay_is_exact_over_a_thousand_steps(fraction, mode, over):
    stages = [Stage("x", 100, {"a": 1, "b": 1}), Stage("y", 1000, {"c": 1})]
    s = stream(stages, batch=7, replay={"fraction": fraction, "mode": mode, "over": over})
    ratio = Fraction(str(fraction))
    per_step = 7 * ratio if mode == "replace" else 7 * ratio / (1 - ratio)
    assert not any(s.index(step).replayed.any() for step in range(100))
    seen, total = set(new_rows(s, range(100))), 0
    for step in range(100, 1100):
        index = s.index(step)
        replayed = [(k, r) for k, r, old in zip(index.source, index.row, index.replayed, strict=True) if old]
        assert len(replayed) in (int(per_step), int(per_step) + 1)
        assert (index.source >= 0).sum() == (7 if mode == "replace" else 7 + len(replayed))
        assert set(replayed) <= seen
        assert over == "earlier" or len(set(replayed)) == len(replayed)
        total += len(replayed)
        assert abs(total - per_step * (step - 99)) <= Fraction(1, 2)
        if over == "seen":
            seen |= set(new_rows(s, [step]))


def test_replay_covers_the_earlier_rows_before_it_repeats_and_knows_their_task():
    stages = [Stage("x", 6, {"a": 1}), Stage("y", 5, {"a": 1, "b": 1}), Stage("z", 60, {"c": 1})]
    s = stream(stages, batch=8, replay={"fraction": 0.25})
    first = {}
    for task, steps in enumerate((range(6), range(6, 11))):
        for key in new_rows(s, steps):
            first.setdefault(key, task)
    picked = []
    for step in range(11, 71):
        index = s.index(step)
        for i in np.flatnonzero(index.replayed):
            key = (int(index.source[i]), int(index.row[i]))
            assert index.task[i] == first[key]
            picked.append(key)
    pool = len(first)
    assert set(picked[:pool]) == set(first)
    assert len(picked[:pool]) == len(set(picked[:pool]))
    assert set(picked[pool : 2 * pool]) == set(first)
    assert picked[:pool] != picked[pool : 2 * pool]


def test_replay_of_all_seen_rows_is_uniform():
    stages = [Stage("x", 5, {"a": 1}), Stage("y", 3000, {"b": 1})]
    s = stream(stages, batch=4, replay={"fraction": 0.5, "over": "seen"})
    counts = Counter()
    for step in range(1000, 3005):
        index = s.index(step)
        counts.update(zip(index.source[index.replayed].tolist(), index.row[index.replayed].tolist(), strict=True))
    pool = 20 + SIZES["b"]
    values = np.array([*counts.values()])
    assert len(values) == pool
    assert ((values - values.mean()) ** 2 / values.mean()).sum() < pool + 4 * np.sqrt(2 * pool)


@pytest.mark.parametrize(("mode", "over"), [("replace", "seen"), ("extend", "earlier")])
def test_vanishing_replay_takes_the_same_new_rows_as_none(mode, over):
    plain = stream()
    for fraction in (0.0, 1e-5):
        s = stream(replay={"fraction": fraction, "mode": mode, "over": over})
        for step in range(s.total_steps):
            keep = s.index(step).source >= 0
            for a, b in zip(s.index(step), plain.index(step), strict=True):
                np.testing.assert_array_equal(a[keep], b)


@pytest.mark.parametrize("over", ["earlier", "seen"])
def test_the_order_of_the_sources_does_not_matter(over):
    replay = {"fraction": 0.3, "over": over}
    a, b = stream(replay=replay), stream(replay=replay, table=dict(reversed(ROWS.items())))
    for step in (0, 31, 75):
        assert_equal(a.at(step), b.at(step))


def test_first_stage_may_replay_what_it_has_seen():
    s = stream([STAGES[0]._replace(replay={"fraction": 0.5, "over": "seen"}), STAGES[1]])
    assert not s.index(0).replayed.any()
    assert all(s.index(step).replayed.sum() == 3 for step in range(1, 30))
    assert set(new_rows(s, [0])) >= {(int(k), int(r)) for k, r, old, *_ in zip(*s.index(1), strict=True) if old}


@pytest.mark.parametrize("mode", ["replace", "extend"])
def test_batches_are_the_rows_of_the_index(mode):
    s = stream(replay={"fraction": 0.3, "mode": mode}, multiple=4)
    assert s.width == (6 if mode == "replace" else 12)
    for step in (0, 35, 99):
        index, batch = s.index(step), s.at(step)
        real = index.source >= 0
        assert all(leaf.shape[0] == s.width for leaf in leaves(batch).values())
        np.testing.assert_array_equal(batch.inputs[real, 0], index.source[real])
        np.testing.assert_array_equal(batch.targets[real, 0], index.row[real])
        np.testing.assert_array_equal(batch.extra["replayed"], index.replayed)
        assert not batch.weights[~real].any()
        assert not batch.segments[~real].any()
        tokens = sum(c["new_tokens"] + c["replayed_tokens"] for c in s.account(step).values())
        assert tokens == batch.weights.sum()


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_any_number_of_hosts_assembles_the_same_batch(hosts):
    s = stream(batch=8, replay={"fraction": 0.3, "mode": "extend"}, multiple=8)
    share = s.width // hosts
    for step in (0, 50):
        whole = leaves(s.at(step))
        parts = [leaves(s.at(step, slice(h * share, (h + 1) * share))) for h in range(hosts)]
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_ledger_adds_up():
    s = stream(replay={"fraction": 0.25, "mode": "extend"})
    ledger = s.ledger(s.total_steps)
    assert {name: entry["new_rows"] for name, entry in ledger.items()} == s.consumed(s.total_steps)
    assert sum(entry["new_rows"] for entry in ledger.values()) == 6 * s.total_steps
    weights = sum(float(s.at(step).weights.sum()) for step in range(s.total_steps))
    assert sum(entry["new_tokens"] + entry["replayed_tokens"] for entry in ledger.values()) == weights
    for step in (1, 31, 95):
        steps = [s.account(i) for i in range(step)]
        for name, entry in s.ledger(step).items():
            assert entry == {key: sum(account[name][key] for account in steps) for key in entry}


def test_stage_table_arithmetic():
    s = stream()
    assert s.boundaries == (30, 70, 120)
    assert [s.stage_of(step) for step in (0, 29, 30, 69, 70, 119)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(IndexError, match="120"):
        s.at(120)
    as_dicts = [{"name": "x", "steps": 30, "mixture": {"a": 1, "b": 1}}, *STAGES[1:]]
    assert stream(as_dicts).fingerprint() == s.fingerprint()


def test_rows_in_columns_and_evaluation_batches():
    images = {"inputs": np.arange(40.0, dtype=np.float32).reshape(10, 2, 2), "targets": np.arange(10, dtype=np.int32)}
    images |= {"weights": np.ones(10, np.float32), "segments": np.ones((10, 1), np.int32)}
    images["positions"] = np.zeros((10, 1), np.int32)
    table = rows.from_columns(images)
    batch = stream([Stage("x", 3, {"a": 1})], batch=4, table={"a": table}).at(1)
    with pytest.raises(UserError, match="the rows of a are no packed text; use over='seen'"):
        stream(
            [Stage("x", 3, {"a": 1})], table={"a": table}, replay={"fraction": 0.1, "over": "reservoir", "capacity": 9}
        )
    np.testing.assert_array_equal(batch.inputs[:, 0, 0] / 4, batch.targets)
    found = list(rows.batches(table, size=4, task=2))
    assert [b.targets.shape for b in found] == [(4,)] * 3
    assert sum(b.weights.sum() for b in found) == 10
    assert len(list(rows.batches(table, size=4, limit=4))) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": []}, "stages: empty"),
        ({"batch": 0}, r"config\.stream\.batch=0: must be at least 1 row$"),
        ({"stages": [Stage("x", 0, {"a": 1})]}, r"stages\[0\].steps=0"),
        ({"stages": [Stage("x", 1, {"aa": 1})]}, "did you mean 'a'"),
        ({"stages": [Stage("x", 1, {"a": -0.5})]}, "mixture.a=-0.5"),
        ({"stages": [Stage("x", 1, {"a": float("nan")})]}, "mixture.a=nan"),
        ({"stages": [Stage("x", 1, {"a": 0})]}, "no source has a weight above 0"),
        ({"stages": [Stage("x", 1, {})]}, "no source has a weight above 0"),
        ({"batch": 24, "stages": [Stage("x", 1, {"a": 1})]}, "less than one batch of 24"),
        ({"stages": [{"name": "x", "steps": 1.5, "mixture": {"a": 1}}]}, "steps=1.5"),
        ({"stages": [{"name": "x", "step": 1, "mixture": {"a": 1}}]}, "did you mean 'steps'"),
        ({"replay": {"fraction": 1.0}}, "replay.fraction=1.0"),
        ({"replay": {"fraction": -0.1}}, "replay.fraction=-0.1"),
        ({"replay": {"fraction": 0.1, "mode": "both"}}, "replay.mode='both'"),
        ({"replay": {"rate": 0.1}}, "replay.rate: unknown key"),
        ({"stages": [Stage("x", 1, {"a": 1}, {"fraction": 0.1})]}, "nothing comes before the first stage"),
        ({"replay": {"fraction": 0.1, "over": "reservoir"}}, "replay.capacity: missing; say how many rows"),
        ({"replay": {"fraction": 0.1, "over": "seen", "capacity": 9}}, "capacity=9: only over='reservoir' has one"),
        ({"replay": {"fraction": 0.1, "over": "reservoir", "capacity": 0}}, "capacity=0: must be at least 1"),
        (
            {
                "replay": {"fraction": 0.1, "over": "reservoir", "capacity": 9},
                "stages": [*STAGES, Stage("w", 1, {"a": 1}, {"capacity": 8})],
            },
            r"capacity is \[8, 9\]; one reservoir serves all stages",
        ),
    ],
)
def test_bad_tables_are_user_errors(change, words):
    with pytest.raises(UserError, match=words):
        stream(**change)
