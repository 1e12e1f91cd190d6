"""The reservoir of a run: the index names its rows, the disk holds their content, and any step can be returned to."""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small
from stream_test import assert_equal, new_rows, stream, table

from jaxcl.data import archive as archives
from jaxcl.data.archive import Archive
from jaxcl.data.reservoir import slots_of
from jaxcl.data.stream import COMMIT_STEPS, Stage
from jaxcl.schema import UserError

SIZES = {"a": 200, "b": 300, "c": 60}
ROWS = {name: table(size, i) for i, (name, size) in enumerate(SIZES.items())}
STAGES = [Stage("x", 20, {"a": 1}), Stage("y", 25, {"b": 0.8, "c": 0.2}), Stage("z", 15, {"c": 1})]  # c twice
END = 60
REPLAY = {"fraction": 0.3, "over": "reservoir", "capacity": 40}


def made(stages=STAGES, rows=ROWS, **replay):
    return stream(stages, table=rows, replay={**REPLAY, **replay})


def opened(s, folder, step=0, **who):
    archive = Archive(str(folder), s, **who)
    archive.check(step)
    archive.open(step)
    return archive


def batches(s, folder, start=0, end=END):
    """The batches of some steps, with the content from the disk."""
    archive = opened(s, folder, start)
    found = [s.at(step, recall=archive.at(step)) for step in range(start, end)]
    archive.close()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return batches(made(), tmp_path_factory.mktemp("whole"))


def assert_all_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("mode", ["replace", "extend"])
def test_the_index_names_the_rows_that_the_reservoir_draws(tmp_path, mode):
    s = made(mode=mode)
    archive, fresh, ends = opened(s, tmp_path), new_rows(s, range(END)), [0]
    for step in range(END):
        index, batch = s.index(step), s.at(step, recall=archive.at(step))
        ends.append(ends[-1] + int((~index.replayed & (index.source >= 0)).sum()))
        number = index.stored[index.replayed]
        assert (index.stored[~index.replayed] == -1).all()
        if number.size:
            words, drawn = archive.reservoir.sample(step, len(number), s.stored(step))
            np.testing.assert_array_equal(number, drawn)
            np.testing.assert_array_equal(batch.inputs[index.replayed], words[:, 1:9])
            assert number.max() < s.stored(step) == ends[step - step % COMMIT_STEPS]
        pairs = list(zip(index.source[index.replayed].tolist(), index.row[index.replayed].tolist(), strict=True))
        assert pairs == [fresh[i] for i in number]
        born = np.searchsorted(ends, number, side="right") - 1
        np.testing.assert_array_equal(batch.task[index.replayed], [s.stage_of(b) for b in born])
        real = index.source >= 0
        np.testing.assert_array_equal(batch.inputs[real, 0], index.source[real])
        np.testing.assert_array_equal(batch.targets[real, 0], index.row[real])
        np.testing.assert_array_equal(batch.extra["replayed"], index.replayed)
    assert (s.index(END - 1).task[s.index(END - 1).replayed] < 2).any()
    archive.close()


def test_the_share_is_exact_and_nothing_is_replayed_before_the_first_commit():
    early = [STAGES[0]._replace(replay={"fraction": 0.5}), *STAGES[1:]]
    for stages, first in ((STAGES, 20), (early, COMMIT_STEPS), ([STAGES[0]._replace(steps=3), *STAGES[1:]], 8)):
        s = made(stages)
        assert not any(s.index(step).replayed.any() for step in range(first))
        counts = [int(s.index(step).replayed.sum()) for step in range(first, s.boundaries[0])]
        assert counts == [3] * len(counts)
        start = max(first, s.boundaries[0])
        total = sum(int(s.index(step).replayed.sum()) for step in range(start, s.boundaries[1]))
        assert abs(total - 0.3 * 6 * (s.boundaries[1] - start)) <= 0.5


def test_the_ledger_counts_what_the_batches_hold(whole):
    s = made()
    ledger = s.ledger(END)
    replayed = sum(batch.extra["replayed"].sum() for batch in whole)
    assert sum(entry["replayed_rows"] for entry in ledger.values()) == replayed > 0
    assert {name: entry["new_rows"] for name, entry in ledger.items()} == s.consumed(END)
    tokens = sum(float((b.weights * b.extra["replayed"][:, None]).sum()) for b in whole)
    assert sum(entry["replayed_tokens"] for entry in ledger.values()) == tokens


def without(s, name):
    """The stream once a source can no longer be read."""

    def gone(index):
        raise AssertionError(f"row {index} of {name} was read from its source")

    k = s.sources.index(name)
    rows = list(s.rows)
    rows[k] = dataclasses.replace(rows[k], fetch=gone, words=gone)
    return s._replace(rows=tuple(rows))


def test_the_content_comes_from_the_disk_and_not_from_the_source(tmp_path, whole):
    s, since = made(), 24  # a is new in steps 0 to 19, and committed by step 24
    archive = opened(s, tmp_path)
    for step in range(since + 1):
        archive.at(step)
    archive.stream = bare = without(s, "a")
    assert any((bare.index(step).source[bare.index(step).replayed] == 0).any() for step in range(since, END))
    found = [bare.at(step, recall=archive.at(step)) for step in range(since, END)]
    assert_all_equal(found, whole[since:])
    archive.close()
    other = without(stream(STAGES, table=ROWS, replay={"fraction": 0.3, "over": "seen"}), "a")
    with pytest.raises(AssertionError, match="was read from its source"):
        [other.at(step) for step in range(since, END)]
    with pytest.raises(ValueError, match="give `recall`"):
        s.at(END - 1)


@pytest.mark.parametrize("ahead", [0, 2, 20])
def test_every_step_can_be_returned_to(tmp_path, whole, ahead):
    s, place = made(), tmp_path / "r"
    for back, end in ((0, 6), (6, 9), (8, 30), (17, 25), (24, 41), (33, 33), (40, 55), (48, END)):
        archive = opened(s, place, back)
        for step in range(back, min(end + ahead, END)):
            assert_equal(s.at(step, recall=archive.at(step)), whole[step])
        archive.close()  # what was read ahead is committed, and nothing else remains
    assert s.stored(END - 1) > 3 * REPLAY["capacity"]


def test_rows_that_an_edited_stage_no_longer_has_are_forgotten(tmp_path, monkeypatch):
    edited = [STAGES[0], STAGES[1]._replace(mixture={"b": 0.1, "c": 0.9}), STAGES[2]]
    expected = batches(made(edited), tmp_path / "straight")
    batches(made(), tmp_path / "r")
    shutil.copytree(tmp_path / "r", tmp_path / "control")
    assert_all_equal(batches(made(edited), tmp_path / "r", 20), expected[20:])
    s, archive = made(edited), Archive(str(tmp_path / "control"), made(edited))
    archive.reservoir = archive._make(own=True)  # without the rewind
    found = [s.at(step, recall=archive.at(step)) for step in range(20, END)]
    assert any((a.inputs != b.inputs).any() for a, b in zip(found, expected[20:], strict=True))
    archive.close()


def test_what_no_checkpoint_needs_is_given_up_and_the_rest_is_kept(tmp_path, whole):
    s = made()
    archive = opened(s, tmp_path)
    for step in range(END):
        assert_equal(s.at(step, recall=archive.at(step)), whole[step])
        archive.release(max(step - 12, 0))
    kept = sum(len(stripe.index) for stripe in archive.reservoir.stripes)
    archive.close()
    accepted = int((slots_of(np.arange(s.stored(END - 1)), 40, s.seed) >= 0).sum())
    assert kept < accepted
    assert_all_equal(batches(s, tmp_path, 44), whole[44:])
    with pytest.raises(UserError, match=r"holds the states from row \d+ to \d+ of the stream, not"):
        Archive(str(tmp_path), s).check(20)


def test_several_processes_replay_the_same_rows(tmp_path, whole):
    s, place = made(), tmp_path / "r"
    half = [slice(0, 3), slice(3, 6)]
    with ThreadPoolExecutor(2) as pool:
        pair = [opened(s, place, process=p, processes=2) for p in range(2)]
        for step in range(30):
            parts = pool.map(lambda p, step=step: s.at(step, half[p], pair[p].at(step)), range(2))
            joined = np.concatenate([part.inputs for part in parts])
            np.testing.assert_array_equal(joined, whole[step].inputs)
        for archive in pair:
            archive.close()
        assert_all_equal(batches(s, place, 21, 40), whole[21:40])  # one goes on with the stripes of two
        three = [opened(s, place, 33, process=p, processes=3) for p in range(3)]
        for step in range(33, 50):
            pool.submit(three[1].at, step)
            for archive in (three[0], three[2]):
                assert_equal(s.at(step, recall=archive.at(step)), whole[step])
    for archive in three:
        archive.close()


def test_waiting_for_a_process_that_is_gone_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "WAIT_SECONDS", 0.05)
    s = made()
    pair = [opened(s, tmp_path / "shared", process=p, processes=2) for p in range(2)]
    for step in (8, 9):
        with pytest.raises(UserError, match=r"shared: another process has committed 0 rows .* and not 48") as error:
            pair[0].at(step)
    assert "\n" not in str(error.value)
    pair[1].at(8)
    pair[0].at(9)
    for archive in pair:
        archive.close()


def file_of(folder, name):
    return max(folder.rglob(name))


def flip(folder):
    """Changes a row that the state holds."""
    s = made()
    with Archive(str(folder), s)._make(own=False) as found:
        (place,) = found.stripes[0].find(found.held(s.stored(29))[5:6])
    path = file_of(folder, "rows-*")
    data = bytearray(path.read_bytes())
    data[place * 4 * found.stripes[0].width] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "all": (shutil.rmtree, r"is missing, which the checkpoint at step 30 needs; restore it from a copy, or start a"),
    "name": (lambda f: (f / "reservoir.json").unlink(), "is missing"),
    "torn name": (lambda f: (f / "reservoir.json").write_text("{"), "reservoir.json is damaged; restore a copy"),
    "stripe": (lambda f: shutil.rmtree(f / "stripe-00000"), "holds the states from row 0 to 0"),
    "head": (lambda f: file_of(f, "head.json").write_text("{}"), "head.json is damaged; restore a copy"),
    "index": (lambda f: file_of(f, "index-*").unlink(), "the log is damaged; restore a copy"),
    "rows": (lambda f: file_of(f, "rows-*").unlink(), "a log is missing; restore a copy"),
    "cut rows": (lambda f: file_of(f, "rows-*").write_bytes(b"1234"), "is damaged; restore a copy"),
    "a bit": (flip, "of the stream is damaged; restore a copy"),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_damage_is_noticed_before_anything_is_written(tmp_path, part):
    s, place = made(), tmp_path / "r"
    batches(s, place, 0, 33)
    damage, words = DAMAGE[part]
    damage(place)
    before = small.tree_of(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        Archive(str(place), s).check(30)
    assert "\n" not in str(error.value)
    assert small.tree_of(tmp_path) == before


def test_an_emptied_reservoir_is_not_taken_for_that_of_the_run(tmp_path):
    s = made()
    opened(s, tmp_path).close()
    Archive(str(tmp_path), s).check(COMMIT_STEPS)  # nothing was committed when step 7 was read
    with pytest.raises(UserError, match="holds the states from row 0 to 0 of the stream, not 48"):
        Archive(str(tmp_path), s).check(COMMIT_STEPS + 1)
