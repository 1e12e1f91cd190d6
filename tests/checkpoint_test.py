"""Checkpoints: bit-exact, whole or absent, and any damage to any file is found."""

import functools
import json
import logging
import os
import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from etils import epath

from jaxcl import checkpoint, checksum, manifests, optim, tree
from jaxcl import mesh as meshes
from jaxcl.checkpoint import MANIFEST, Checkpoints
from jaxcl.checksum import checksums
from jaxcl.saved import copy, read
from jaxcl.schema import UserError
from jaxcl.types import TrainState

AXES = {"a": ("embed", "mlp"), "b": (None,), "none": (None, None)}


def make_state(step=0):
    rng = np.random.default_rng(step)
    params = {
        "a": jnp.asarray(rng.normal(size=(16, 32)), jnp.float32),
        "b": jnp.asarray([np.nan, -0.0, np.inf], jnp.bfloat16),
        "none": jnp.zeros((0, 3)),
    }
    memory = {
        "er": {"rows": {"inputs": jnp.asarray(rng.integers(0, 99, (16, 4)), jnp.int32)}, "seen": jnp.int32(step)},
        "odd": (jnp.asarray(rng.integers(0, 2, 5), bool), jnp.asarray(rng.integers(-9, 9, 3), jnp.int8)),
    }
    return TrainState(jnp.int32(step), params, optim.make(lr=1e-3).init(params), memory)


def assert_same(a, b):
    for (name, x), (_, y) in zip(tree.named_leaves(a), tree.named_leaves(b), strict=True):
        assert x.dtype == y.dtype, name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def abstract():
    return jax.eval_shape(make_state)


def write(directory, *steps, **options):
    with Checkpoints(directory, **{"keep": 9} | options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})
    return checkpoints


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    write(directory, 10, 20)
    return directory


@pytest.fixture
def saved(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def test_a_state_comes_back_bit_for_bit(saved):
    restored = Checkpoints(saved).restore(abstract())
    assert (restored.step, restored.host, restored.message) == (20, {"position": 20}, None)
    assert_same(restored.state, make_state(20))
    assert Checkpoints(saved).restore(abstract(), step=10).host == {"position": 10}


def test_an_empty_directory_holds_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(abstract()) is None
    assert checkpoints.steps() == []
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_saved_on_one_mesh_restored_on_another(tmp_path, sizes):
    before, after = meshes.make(data=1, fsdp=4, tensor=2), meshes.make(**sizes)
    cut = lambda m: meshes.state_shardings(m, AXES, abstract())  # noqa: E731
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, jax.device_put(make_state(1), cut(before)), {})
        restored = checkpoints.restore(meshes.with_shardings(abstract(), cut(after)))
    assert_same(restored.state, make_state(1))
    for (_, leaf), (_, sharding) in zip(tree.named_leaves(restored.state), tree.named_leaves(cut(after)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = {"w": jnp.zeros((256, 256)), "n": jnp.int32(0)}
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(4):
            checkpoints.save(step, TrainState(jnp.int32(step), state, ()), {})
            for _ in range(10):
                state = advance(state)
        for step in range(4):
            found = checkpoints.restore(jax.eval_shape(lambda: TrainState(jnp.int32(0), state, ())), step=step)
            assert int(found.state.params["n"]) == 10 * step
            assert np.all(np.asarray(found.state.params["w"]) == 10 * step)


def files_of(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def damages(path):
    """(what, new contents) for a file; None = missing."""
    data = path.read_bytes()
    flip = lambda i: data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]  # noqa: E731
    yield "missing", None
    yield "longer", data + b"\0"
    if data:
        yield "empty", b""
        yield "cut", data[: len(data) // 2]
        for i in {0, len(data) // 2, len(data) - 1}:
            yield f"bit {i}", flip(i)


def refuses(checkpoints, step):
    try:
        checkpoints.restore(abstract(), step=step)
    except UserError as error:
        return f"checkpoint {step} is unusable" in str(error)
    return False


def test_any_damage_to_any_file_is_found(saved):
    newest = saved / "20"
    assert len(files_of(newest)) > 8
    checkpoints = Checkpoints(saved)
    for name in files_of(newest):
        whole = (newest / name).read_bytes()
        for what, data in damages(newest / name):
            (newest / name).unlink() if data is None else (newest / name).write_bytes(data)
            assert refuses(checkpoints, 20), f"{name}: {what}"
            (newest / name).write_bytes(whole)
        (newest / name).write_bytes(whole + b"!")
        restored = checkpoints.restore(abstract())
        assert restored.step == 10
        assert "checkpoint 20 is unusable" in restored.message
        assert "step 10" in restored.message
        assert_same(restored.state, make_state(10))
        (newest / name).write_bytes(whole)
    assert checkpoints.restore(abstract()).step == 20


def test_arrays_that_differ_from_those_saved_are_found(saved):
    """The files are in order here: only the checksums of the arrays can tell."""
    shutil.rmtree(saved / "20" / "state")
    shutil.copytree(saved / "10" / "state", saved / "20" / "state")
    manifests = [json.loads((saved / s / MANIFEST).read_text().splitlines()[0]) for s in ("10", "20")]
    files = manifests[0]["files"] | {"host.json": manifests[1]["files"]["host.json"]}
    line = json.dumps(manifests[1] | {"files": files})
    (saved / "20" / MANIFEST).write_text(f"{line}\n{checkpoint.hashlib.sha256(line.encode()).hexdigest()}\n")
    restored = Checkpoints(saved).restore(abstract())
    assert restored.step == 10
    assert "an array differs" in restored.message
    with pytest.raises(UserError, match=r"checkpoint 20: \S+ differs from what was saved; choose another step"):
        read(saved, step=20)


def test_manifests_that_do_not_speak_of_a_base_hold_everything(saved):
    manifest = json.loads((saved / "20" / MANIFEST).read_text().splitlines()[0])
    assert manifest.pop("base") is True
    line = json.dumps(manifest)
    (saved / "20" / MANIFEST).write_text(f"{line}\n{checkpoint.hashlib.sha256(line.encode()).hexdigest()}\n")
    assert Checkpoints(saved).restore(abstract()).step == 20


def test_a_save_that_was_cut_short_is_never_read(saved, tmp_path):
    (saved / "20" / MANIFEST).unlink()
    assert Checkpoints(saved).steps() == [10]
    restored = Checkpoints(saved).restore(abstract())
    assert restored.step == 10
    assert "cut short" in restored.message
    (saved / "10" / MANIFEST).unlink()
    assert Checkpoints(saved).restore(abstract()) is None


def test_if_all_are_damaged_the_run_does_not_start_again_by_itself(saved):
    for step in ("10", "20"):
        (saved / step / "host.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint can be read.*20.*10.*remove it"):
        Checkpoints(saved).restore(abstract())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.params.update(a=jnp.zeros((16, 33))), r"'params/a' is float32\[16, 32\].*float32\[16, 33\]"),
        (lambda s: s.params.update(a=jnp.zeros((16, 32), jnp.bfloat16)), "'params/a' is float32.*bfloat16"),
        (lambda s: s.params.update(more=jnp.zeros(2)), "no leaf 'params/more'"),
        (lambda s: s.memory.pop("odd"), "holds the leaf 'memory/odd/0'"),
    ],
)
def test_another_structure_is_refused_by_name(saved, change, words):
    state = make_state()
    change(state)
    with pytest.raises(UserError, match=words):
        Checkpoints(saved).restore(jax.eval_shape(lambda: state))


def test_a_loop_that_forbids_transfers_may_save_and_restore(tmp_path):
    state = jax.block_until_ready(make_state(1))
    with jax.transfer_guard("disallow"), Checkpoints(tmp_path, every_steps=1) as checkpoints:
        assert checkpoints.due(1)
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(abstract())
    assert_same(restored.state, state)


def test_what_keep_names_stays(tmp_path):
    checkpoints = write(tmp_path, 5, 10, 15, 20, 25, keep=2, keep_every=10)
    assert checkpoints.steps() == [10, 20, 25]
    assert sorted(os.listdir(tmp_path)) == ["10", "20", "25"]


def test_what_was_cut_short_is_removed_once_a_later_save_is_whole(saved):
    (saved / "10" / MANIFEST).unlink()
    write(saved, 30)
    assert sorted(os.listdir(saved)) == ["20", "30"]


def test_a_new_attempt_moves_the_old_one_aside(saved):
    write(saved, 15)
    assert Checkpoints(saved).steps() == [10, 15]
    assert (saved / "20.discarded" / MANIFEST).exists()
    write(saved, 15)
    assert Checkpoints(saved).restore(abstract()).message is None


def test_due_by_steps_and_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    by_steps = Checkpoints(tmp_path, every_steps=3, every_minutes=None)
    assert [step for step in range(1, 10) if by_steps.due(step)] == [3, 6, 9]
    by_time = Checkpoints(tmp_path, every_minutes=2)
    now[0] = 119.0
    assert not by_time.due(1)
    now[0] = 121.0
    assert by_time.due(2)
    by_time.save(2, make_state(2), {})
    by_time.wait()
    assert not by_time.due(3)


def test_a_save_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "fingerprint", lambda path: 1 / 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(RuntimeError, match=r"checkpoint 1 .* was not written"):
        checkpoints.wait()
    checkpoints.wait()
    assert checkpoints.steps() == []


def test_without_background_a_checkpoint_is_whole_or_refused_when_save_returns(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, background=False)
    held = checkpoints.save(1, make_state(1), {})
    assert checkpoints.steps() == [1]  # nobody waited
    assert held > 0
    monkeypatch.setattr(manifests, "fingerprint", lambda path: 1 / 0)
    with pytest.raises(checkpoint.NotSaved, match=r"checkpoint 2 .* was not written"):
        checkpoints.save(2, make_state(2), {})
    monkeypatch.undo()
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert_same(Checkpoints(tmp_path).restore(abstract()).state, make_state(1))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells what a process holds")
def test_saves_do_not_make_the_process_larger_and_larger(tmp_path):
    """Their buffers come between those of the steps, where memory that is kept would stay in pieces."""
    ((state, after),) = processes.run("held", tmp_path)
    assert min(after[4:]) <= 5.5 * state, after  # 6.5 times without giving back, and more with every save


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    for options in ({"every_steps": 0}, {"every_minutes": -1.0}, {"keep": 0}, {"keep_every": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            Checkpoints(tmp_path, **options)
    with pytest.raises(TypeError, match="'params/w'"):
        Checkpoints(tmp_path).save(1, TrainState(jnp.int32(1), {"w": np.ones(2)}, ()), {})
    with pytest.raises(ValueError, match="JSON"):
        Checkpoints(tmp_path).save(1, make_state(1), {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_copy_of_one_checkpoint_is_whole(saved, tmp_path):
    assert copy(saved, tmp_path / "new", step=10) == 10
    restored = Checkpoints(tmp_path / "new").restore(abstract())
    assert (restored.step, restored.host) == (10, {"position": 10})
    assert_same(restored.state, make_state(10))
    assert Checkpoints(saved).steps() == [10, 20]
    with pytest.raises(UserError, match="has checkpoints already"):
        copy(saved, tmp_path / "new")
    with pytest.raises(UserError, match=r"no checkpoint at step 15.*\[10, 20\]"):
        copy(saved, tmp_path / "other", step=15)
    (saved / "20" / "host.json").write_text("{}")
    with pytest.raises(UserError, match=r"damaged: host.json was altered"):
        copy(saved, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_files_that_another_process_writes_are_not_hashed(tmp_path):
    """Every process lists the folder while the others write their share of the hashes beside it."""
    for name in ("host.json", "state/d/0", "part-1", ".part-1.tmp", ".part-12.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert manifests.files(tmp_path) == ["host.json", "state/d/0"]


def test_killed_while_saving_it_goes_on_from_a_whole_checkpoint(tmp_path):
    """The worker asserts that what it restores is the state of that step."""
    draw = random.Random(0)
    for _ in range(4):
        (worker,) = started = processes.start("saves", tmp_path, 10**6)
        processes.wait_for(started, "saving from")
        deadline = time.monotonic() + 300
        while not Checkpoints(tmp_path).steps() and time.monotonic() < deadline:  # one must be whole, at any speed
            time.sleep(0.05)
        time.sleep(draw.uniform(0.2, 1.5))
        worker.popen.kill()
        processes.finish(started, codes=(-9,))
    before = Checkpoints(tmp_path).steps()
    assert before
    started = processes.start("saves", tmp_path, 3)
    assert processes.finish(started) == [before[-1]]
    assert Checkpoints(tmp_path).steps()[-1] == before[-1] + 3
    assert sorted(os.listdir(tmp_path)) == sorted(str(step) for step in Checkpoints(tmp_path).steps())
    lines = started[0].log.read_text().splitlines()
    assert lines == [f"saving from {before[-1]}", f"RESULT {before[-1]}"]  # nothing else reaches the terminal


def test_only_errors_of_orbax_reach_the_log():
    record = lambda path, level: logging.LogRecord("absl", level, path, 1, "", (), None)  # noqa: E731
    assert not checkpoint._not_orbax(record("/site/orbax/checkpoint/x.py", logging.WARNING))
    assert checkpoint._not_orbax(record("/site/orbax/checkpoint/x.py", logging.ERROR))
    assert checkpoint._not_orbax(record("/site/jaxcl/train.py", logging.INFO))


def test_checksums_equal_numpy_on_any_mesh_and_change_with_any_element():
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    index = np.arange(96, dtype=np.uint64)
    odd = ((index * 0x9E3779B1) % 2**32) ^ (index >> 15) | 1
    wanted = int((x.view(np.uint32).ravel().astype(np.uint64) * odd % 2**32).sum() % 2**32)
    cut = jax.device_put(x, meshes.batch_sharding(meshes.make()))
    assert int(checksums([jnp.asarray(x)])[0]) == int(checksums([cut])[0]) == wanted
    for i in range(96):
        y = x.copy()
        y.view(np.uint32).ravel()[i] ^= 1
        assert int(checksums([jnp.asarray(y)])[0]) != wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "complex64", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(2**20,), (2**20 + 1,), (3, 2**20 - 1), (2050, 1001, 2)])
def test_the_checksum_of_a_large_array_is_taken_in_blocks(dtype, shape):
    """On one CPU, where all at once takes as much memory as the array, which blocks do not."""
    with jax.enable_x64(dtype == "float64"):
        x = (np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)
        cut = (
            jax.device_put(x, meshes.batch_sharding(meshes.make(devices=jax.devices()[:2]))) if not shape[0] % 2 else x
        )
        whole = jax.device_put(x, jax.devices()[0])
        wanted = int(jax.jit(checksum._checksum)(whole))
        assert int(checksums([whole])[0]) == wanted
        if cut is not x:
            assert int(checksums([cut])[0]) == wanted
        taken = jax.jit(functools.partial(checksum._checksum_all, True)).lower([whole]).compile().memory_analysis()
        assert taken.temp_size_in_bytes <= 32 * checksum.BLOCK
        last = x.copy()
        last.view(np.uint8).reshape(-1)[-1] ^= 1
        assert int(checksums([jax.device_put(last, jax.devices()[0])])[0]) != wanted


def test_a_second_place_holds_copies_that_are_read_when_the_first_is_damaged(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, 1, 2, 3, keep=2, second=str(second))
    assert [sorted(p.name for p in place.iterdir()) for place in (first, second)] == [["2", "3"], ["2", "3", "OWNER"]]
    (first / "3" / "host.json").write_text("{}")
    with Checkpoints(first, second=str(second)) as checkpoints:
        found = checkpoints.restore(abstract())
    assert found.step == 3
    assert f"resuming from step 3 in {second}" in found.message
    assert "host.json was altered" in found.message
    assert_same(found.state, make_state(3))
    shutil.rmtree(first)
    with Checkpoints(first, second=str(second)) as checkpoints:
        found = checkpoints.restore(abstract())
        assert_same(found.state, make_state(3))
        assert_same(checkpoints.restore(abstract(), step=2).state, make_state(2))
    with Checkpoints(first) as checkpoints:
        assert checkpoints.restore(abstract()) is None


def test_a_copy_that_was_cut_short_is_none(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, 1, 2, second=str(second))
    (second / "2" / MANIFEST).unlink()
    (first / "2" / MANIFEST).write_text("no")
    with Checkpoints(first, second=str(second)) as checkpoints:
        found = checkpoints.restore(abstract())
    assert found.step == 1
    assert found.message.endswith("resuming from step 1")  # in the first place, which is asked before the second


def test_a_second_place_that_cannot_be_written_is_told_and_costs_nothing(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    with Checkpoints(first, second=str(second)) as checkpoints:
        second.write_text("a file")  # where a folder is to be made
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        about, told = checkpoints.warnings()
        assert str(second) in about
        assert told.startswith(f"checkpoint 1 was not copied to {second}")
        assert checkpoints.warnings() == []
        assert checkpoints.steps() == [1]


def test_a_copy_that_differs_from_what_was_written_is_none(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    place = type(epath.Path(first))
    plain = place.copy

    def flipped(source, target, *rest, **named):
        done = plain(source, target, *rest, **named)
        if source.name == "manifest.ocdbt":
            data = source.read_bytes()
            target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return done

    monkeypatch.setattr(place, "copy", flipped)
    checkpoints = write(first, 1, second=str(second))
    (told,) = checkpoints.warnings()
    assert told.startswith(f"checkpoint 1 was not copied to {second}: {second}")
    assert "manifest.ocdbt: differs from what was written" in told
    assert (second / "1").exists()
    assert not (second / "1" / MANIFEST).exists()
    assert checkpoints.steps() == [1]


def test_a_second_place_that_cannot_be_listed_costs_nothing(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, 1, second=str(second))
    plain = manifests.steps

    def away(directory):
        if directory == epath.Path(second):
            raise OSError(5, "Input/output error")
        return plain(directory)

    with Checkpoints(first, second=str(second)) as checkpoints:
        monkeypatch.setattr(manifests, "steps", away)
        found = checkpoints.restore(abstract())
    assert (found.step, found.message) == (1, None)


def test_what_another_attempt_left_in_the_second_place_is_moved_away(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, 1, 2, second=str(second))
    (first / "2" / "host.json").write_text("{}")
    (second / "2" / "host.json").write_text("{}")
    with Checkpoints(first, keep=9, second=str(second)) as checkpoints:
        assert checkpoints.restore(abstract()).step == 1
        checkpoints.save(2, make_state(2), {"position": 2})
    assert (second / "2.discarded").exists()
    with Checkpoints(first, second=str(second)) as checkpoints:
        assert checkpoints.restore(abstract()).step == 2


def test_the_second_place_is_another_one(tmp_path):
    with pytest.raises(UserError, match=r"config.checkpoint.second='.*': holds the first place"):
        Checkpoints(tmp_path / "run" / "checkpoints", second=str(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config.checkpoint.second='.*file': is a file"):
        Checkpoints(tmp_path / "run" / "checkpoints", second=str(tmp_path / "file"))


def test_a_second_place_belongs_to_one_run(tmp_path):
    write(tmp_path / "one", 1, second=str(tmp_path / "second"))
    with pytest.raises(UserError, match=r"config.checkpoint.second='.*': belongs to .*one; name another folder"):
        Checkpoints(tmp_path / "two", second=str(tmp_path / "second"))
    with pytest.raises(UserError, match=r"has files that are no copies of this run"):
        Checkpoints(tmp_path / "two", second=str(tmp_path / "one"))
    for bad in (5, ""):
        with pytest.raises(UserError, match="name a folder"):
            Checkpoints(tmp_path / "two", second=bad)
    assert sorted(p.name for p in (tmp_path / "second").iterdir()) == ["1", "OWNER"]
