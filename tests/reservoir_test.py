"""The disk reservoir: uniform by Vitter's algorithm, the same from any number of writers, exact after any crash."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxcl.data.reservoir import make, slots_of
from jaxcl.schema import UserError

WIDTH = 5
ROOT = Path(__file__).parent.parent


def rows(start, n):
    """Rows of the stream: every word is a function of the row's number."""
    return (np.arange(start, start + n)[:, None] * 7919 + np.arange(WIDTH)).astype(np.uint32)


def oracle(n, capacity, seed):
    """Algorithm R, one row after another."""
    held = {}
    for i, slot in enumerate(slots_of(np.arange(n), capacity, seed).tolist()):
        assert slot == i if i < capacity else -1 <= slot < capacity
        if slot >= 0:
            held[slot] = i
    return np.array([held[s] for s in range(min(n, capacity))], np.int64)


def fill(path, end, *, step=16, capacity=20, stripes=3, **options):
    r = make(str(path), capacity=capacity, width=WIDTH, seed=1, stripes=stripes, **options)
    for start in range(r.count, end, step):
        r.add(rows(start, min(step, end - start)), start)
        r.commit(durable=False)
    return r


def check(r, count, capacity=20):
    """The state at `count` is the oracle's, and the words are those of the rows."""
    index = r.held(count)
    np.testing.assert_array_equal(index, oracle(count, capacity, 1))
    words, drawn = r.sample(0, len(index), count)
    assert sorted(drawn) == sorted(index)
    np.testing.assert_array_equal(words, np.concatenate([rows(i, 1) for i in drawn]))


def survivors(seed, always=False, n=2000, capacity=100):
    """Rows held after n; `always`: the published variant that overwrites a random slot whenever the buffer is full."""
    slots = slots_of(np.arange(n), capacity, seed)
    if always:
        slots[capacity:] = np.random.default_rng(seed).integers(0, capacity, n - capacity)
    held = np.full(capacity, -1)
    keep = slots >= 0
    held[slots[keep]] = np.arange(n)[keep]
    return held


def age_p_value(always):
    held = np.concatenate([survivors(seed, always) for seed in range(600)])
    return stats.chisquare(np.bincount(held // 200, minlength=10)).pvalue


def test_a_decision_depends_on_the_row_alone():
    together = slots_of(np.arange(500), 20, 1)
    assert [int(slots_of(np.array([i]), 20, 1)[0]) for i in range(500)] == together.tolist()
    assert (slots_of(np.arange(500), 20, 2) != together).any()


def test_ages_are_uniform_and_the_published_variant_is_not():
    assert age_p_value(always=False) > 0.01
    assert age_p_value(always=True) < 1e-100


def test_a_row_enters_as_often_as_vitter_says():
    """Row i with probability 2 / (i + 1); 2 / (i + 2), an off-by-one of published code, is 20 deviations away."""
    index, trials = np.arange(2, 8), 4000
    slots = np.stack([slots_of(index, 2, seed) for seed in range(trials)])
    chance = 2 / (index + 1)
    for slot in (0, 1):
        expected = trials * np.sum(chance / 2)
        assert abs(np.sum(slots == slot) - expected) < 4 * np.sqrt(trials * np.sum(chance / 2 * (1 - chance / 2)))


def test_pairs_are_held_together_as_often_as_they_should():
    n, capacity, trials = 2000, 100, 600
    inside = np.zeros((trials, n), bool)
    for seed in range(trials):
        inside[seed, survivors(seed)] = True
    expected = capacity * (capacity - 1) / (n * (n - 1))
    for distance in (1, 7, 100, 1000, 1900):
        pairs = (inside[:, :-distance] & inside[:, distance:]).sum(axis=1)
        error = pairs.std() / np.sqrt(trials)
        assert abs(pairs.mean() - expected * (n - distance)) < 3.5 * error


def test_the_state_is_vitters_at_every_count(tmp_path):
    r = fill(tmp_path, 300)
    for count in (1, 15, 16, 20, 21, 100, 299, 300):
        check(r, count)
    check(fill(tmp_path / "one", 100, step=1, stripes=1), 100)
    r.close()


def test_batches_may_be_cut_anyhow(tmp_path):
    a, b = fill(tmp_path / "a", 200, step=200), fill(tmp_path / "b", 200, step=7)
    for x, y in zip(a.sample(3, 12), b.sample(3, 12), strict=True):
        np.testing.assert_array_equal(x, y)


def test_samples_depend_on_the_step_and_are_without_repeats(tmp_path):
    r = fill(tmp_path, 200)
    draws = np.stack([r.sample(step, 6)[1] for step in range(2000)])
    assert all(len(set(d)) == 6 for d in draws.tolist())
    counts = np.unique(draws, return_counts=True)[1]
    assert len(counts) == 20
    assert stats.chisquare(counts).pvalue > 0.001
    np.testing.assert_array_equal(r.sample(5, 6)[1], draws[5])
    assert len(set(r.sample(0, 50)[1].tolist())) == 20  # more than it holds: again from the start


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 160), min_size=1, max_size=4))
def test_rewind_is_exact_and_what_follows_is_the_same(tmp_path_factory, stops):
    r = fill(tmp_path_factory.mktemp("r"), 160)
    for count in stops:
        r.rewind(min(count, r.count))
        if r.count:
            check(r, r.count)
    for start in range(r.count, 250, 9):
        r.add(rows(start, min(9, 250 - start)), start)
    r.commit()
    check(r, 250)
    r.close()


def test_release_bounds_the_disk_and_keeps_later_states(tmp_path):
    r = fill(tmp_path, 40)
    for end in range(200, 20_000, 200):
        r.add(rows(r.count, end - r.count), r.count)
        r.commit(durable=False)
        r.release(end - 200)
        if end % 2000 == 0:
            for count in (end - 200, end - 100, end):
                check(r, count)
    size = sum(f.stat().st_size for f in tmp_path.rglob("rows-*"))
    assert size <= 3 * 20 * WIDTH * 4
    with pytest.raises(UserError, match="restore a checkpoint in between"):
        r.rewind(100)
    r.close()
    check(fill(tmp_path, 0), 19_800)


def test_only_the_wanted_rows_need_be_read(tmp_path):
    a, b = fill(tmp_path / "a", 120), fill(tmp_path / "b", 100)
    index = b.wanted(20)
    assert len(index) < 20
    b.add(np.concatenate([rows(i, 1) for i in index]), 100, total=20)
    b.commit()
    np.testing.assert_array_equal(a.sample(1, 20)[0], b.sample(1, 20)[0])


# What a child process needs, without the imports of the tests.
CHILD = f"""
import sys
import numpy as np
from jaxcl.data.reservoir import make
r = make(sys.argv[1], capacity=20, width={WIDTH}, seed=1, stripes=4, own=eval(sys.argv[2]))
def add(n):
    i = r.count
    r.add((np.arange(i, i + n)[:, None] * 7919 + np.arange({WIDTH})).astype(np.uint32), i)
    return r.commit(durable=False)
"""


def child(path, own, then, **options):
    return subprocess.Popen([sys.executable, "-c", CHILD + then, str(path), repr(own)], cwd=ROOT, **options)


def test_two_processes_write_what_one_writes(tmp_path):
    runs = [child(tmp_path / "two", [p, p + 2], "while add(8) < 600: pass") for p in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    one, two = fill(tmp_path / "one", 600, stripes=4), fill(tmp_path / "two", 600, stripes=4)  # 2 writers -> 1
    assert two.count == 600
    for step in range(5):
        for x, y in zip(one.sample(step, 9), two.sample(step, 9), strict=True):
            np.testing.assert_array_equal(x, y)
    check(two, 600)


def test_a_reader_sees_the_commits_of_the_other_process(tmp_path):
    a = make(str(tmp_path), capacity=20, width=WIDTH, seed=1, stripes=2, own=[0])
    b = make(str(tmp_path), capacity=20, width=WIDTH, seed=1, stripes=2, own=[1])
    generation = 0
    for start in range(0, 960, 16):
        for r in (a, b):
            r.add(rows(start, 16), start)
        a.commit()
        with pytest.raises(UserError, match="commit on every process first"):
            a.sample(0, 4, count=start + 16)
        b.commit()
        for x, y in zip(a.sample(start, 7, count=start + 16), b.sample(start, 7, count=start + 16), strict=True):
            np.testing.assert_array_equal(x, y)
        check(a, start + 16)
        for r in (a, b):
            r.release(start)
        for i, words in zip(a.contents.at(start + 16), a.read(a.contents.at(start + 16)), strict=True):
            np.testing.assert_array_equal(words, rows(i, 1)[0])  # a has not been told of b's new log
        generation = max(generation, b.stripes[1].head.generation)
    assert generation > 1  # the log that the other process reads was rewritten meanwhile
    for r in (a, b):
        r.rewind(950)
        r.add(rows(950, 50) + 1, 950)  # other rows than before
        r.commit()
    np.testing.assert_array_equal(a.sample(0, 20)[0], b.sample(0, 20)[0])
    a.close()
    with pytest.raises(UserError, match="another process writes it"):
        make(str(tmp_path), capacity=20, width=WIDTH, seed=1, stripes=2)


def test_kill_during_writes_loses_nothing_committed(tmp_path):
    forever = "while True:\n    print(add(5), flush=True)\n    r.release(r.count - 40)"
    path = tmp_path / "r"
    for delay in (0.0, 0.01, 0.03, 0.1):
        log = tmp_path / "log"
        with open(log, "wb") as out:
            run = child(path, range(4), forever, stdout=out)
            while not log.stat().st_size and run.poll() is None:
                time.sleep(0.005)
            time.sleep(delay)
            os.kill(run.pid, signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        reported = [int(line) for line in log.read_text().split("\n")[:-1]]
        r = fill(path, 0, stripes=4)
        assert r.count >= reported[-1]
        check(r, r.count)
        back = max(r.count - 20, 5)
        r.rewind(back)  # a checkpoint from before the crash
        check(r, back)
        r.close()


@pytest.mark.parametrize("calls", range(1, 40))
def test_stop_at_every_system_call_of_a_commit(tmp_path, monkeypatch, calls):
    """Kills the process' view at the k-th write, rename or removal; whatever is left must open as a committed state."""
    r = fill(tmp_path, 96)
    r.add(rows(96, 200), 96)
    left = [calls]

    class Stop(BaseException):
        pass

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Stop
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "remove", "fsync", "open", "fdopen"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            r.commit()
            r.release(250)
        except Stop:
            pass
    finished = left[0] > 0
    r.close()
    again = fill(tmp_path, 0)
    assert again.count in ((296,) if finished else (96, 296))
    check(again, again.count)
    if again.count == 96:
        again.add(rows(96, 200), 96)
        again.commit()
        check(again, 296)


def test_damage_is_noticed(tmp_path):
    r = fill(tmp_path, 100, stripes=1)
    r.close()
    (file,) = tmp_path.rglob("rows-*")
    content = bytearray(file.read_bytes())
    place = int(r.stripes[0].find(r.held()[3:4])[0]) * WIDTH * 4
    content[place] ^= 1
    file.write_bytes(content)
    with fill(tmp_path, 0, stripes=1) as r, pytest.raises(UserError, match="is damaged"):
        r.sample(0, 20)
    file.rename(tmp_path / "gone")
    with fill(tmp_path, 0, stripes=1) as r, pytest.raises(UserError, match="a log is missing; restore a copy"):
        r.sample(0, 20)
    (tmp_path / "gone").rename(file)
    (head,) = tmp_path.rglob("head.json")
    head.write_text(head.read_text().replace('"count": 100', '"count": 101'))
    with pytest.raises(UserError, match=r"head.json is damaged"):
        fill(tmp_path, 0, stripes=1)


def test_errors_say_what_to_do(tmp_path):
    r = make(str(tmp_path), capacity=4, width=WIDTH)
    for call, words in [
        (lambda: r.sample(0, 1), "commit before sampling"),
        (lambda: r.add(rows(1, 1), 1), "row 1 given, row 0 expected"),
        (lambda: r.add(rows(0, 1).astype(np.int64), 0), "expected uint32"),
        (lambda: r.add(rows(0, 1), 0, total=3), r"wanted\(3\) names 3"),
        (lambda: make(str(tmp_path), capacity=5, width=WIDTH), "capacity': 4"),
        (lambda: make(str(tmp_path), capacity=0, width=WIDTH), "capacity=0"),
        (lambda: make(str(tmp_path), capacity=4, width=WIDTH, own=[1]), "numbered 0 to 0"),
        (lambda: r.read(np.array([3])), "lacks row 3"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
