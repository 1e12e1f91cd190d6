"""Residual, add, subtract, lerp: bit for bit where nothing changes, right elsewhere, on trees and on folders."""

import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from jaxcl import tree
from jaxcl.hf import __main__ as command
from jaxcl.hf import arithmetic, families, files, write
from jaxcl.schema import UserError

DTYPES = ("float32", "bfloat16", "float16")
EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
ROWS, WIDTH = 11, 6


def odd(kind):
    """Returns bits that arithmetic would not keep: -0.0, NaN with a payload, infinity, the smallest numbers."""
    bits = {"float32": "u4", "bfloat16": "u2", "float16": "u2"}[kind]
    held = {
        "float32": [1 << 31, 0x7FC00123, 0xFFC00001, 0x7F800000, 1],
        "bfloat16": [1 << 15, 0x7FC5, 0xFFC1, 0x7F80, 1],
    }
    return np.array(held.get(kind, [1 << 15, 0x7E05, 0xFE01, 0x7C00, 1]), bits).view(np.dtype(kind))


def model(seed, kind="float32", rows=ROWS, special=False):
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (rows, WIDTH), HEAD: (rows, WIDTH), UP: (5, WIDTH), "model.norm.weight": (WIDTH,)}
    out = {name: rng.normal(size=shape).astype(kind) for name, shape in shapes.items()}
    if special:
        out["model.norm.weight"][:5] = odd(kind)
    return out


def moved(tensors, seed, size=0.1):
    rng = np.random.default_rng(seed)
    return {n: (t.astype(np.float32) + size * rng.normal(size=t.shape)).astype(t.dtype) for n, t in tensors.items()}


def words(path, tokens):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0])).save(
        str(path)
    )


def save(folder, tensors, tokens=None, shard_bytes=2**30, **config):
    with write.Writer(folder, shard_bytes=shard_bytes) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
        out.json("config.json", {"model_type": "llama", "tie_word_embeddings": False, **config})
        if tokens:
            words(out.partial / "tokenizer.json", tokens)
    return folder


def load(folder):
    held = files.open_folder(folder)
    return {name: held.read(name) for name in held.file_of}


def run(*argv):
    command.main([str(a) for a in argv])


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), name


def three(folder, kind="float32", **options):
    base = model(0, kind)
    instruct, continued = moved(base, 1), moved(base, 2)
    made = {"base": base, "instruct": instruct, "continued": continued}
    for name, tensors in made.items():
        save(folder / name, tensors, **options)
    return made


def residual(folder, out="out", **options):
    extra = [f"--{key}={value}" for key, value in options.items()]
    run(
        "residual", folder / "continued", folder / out, f"--base={folder}/base", f"--instruct={folder}/instruct", *extra
    )
    return load(folder / out)


# Trees.


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("jit", [False, True])
def test_tree_residual_of_zero_steps_keeps_every_bit(kind, jit):
    base, instruct = model(0, kind, special=True), model(1, kind, special=True)
    a, b = (jax.tree.map(jnp.asarray, t) for t in (base, instruct))
    out = (jax.jit(tree.residual) if jit else tree.residual)(a, a, b)
    same_bits(jax.tree.map(np.asarray, out), jax.tree.map(np.asarray, b))
    np.testing.assert_array_equal(np.asarray(b["model.norm.weight"]).tobytes(), instruct["model.norm.weight"].tobytes())


@pytest.mark.parametrize("kind", DTYPES)
def test_tree_residual_matches_float64_and_does_not_care_about_shards(kind):
    base = model(0, kind)
    trees = [moved(base, 2), base, moved(base, 1)]
    got = jax.jit(tree.residual)(*(jax.tree.map(jnp.asarray, t) for t in trees))
    for name in base:
        c, b, i = (t[name].astype(np.float64) for t in trees)
        want = (i + (c - b)).astype(np.float32).astype(kind)
        tolerance = 3e-7 if kind == "float32" else float(ml_dtypes.finfo(kind).eps)
        np.testing.assert_allclose(
            got[name].astype(np.float32), want.astype(np.float32), atol=tolerance, rtol=tolerance
        )
        assert got[name].dtype == kind
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    large = [{"x": jnp.asarray(np.random.default_rng(s).normal(size=(16, 3)), kind)} for s in range(3)]
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    sharded = jax.jit(tree.residual)(*jax.device_put(large, spec))
    assert len(sharded["x"].sharding.device_set) == 8
    same_bits(jax.tree.map(np.asarray, sharded), jax.tree.map(np.asarray, jax.jit(tree.residual)(*large)))


def test_tree_lerp_keeps_the_bits_of_both_ends():
    a = {"x": jnp.array([-0.0, 1e8, 0.1, jnp.inf])}
    b = {"x": jnp.array([1.0, 0.3, -0.0, 2.0])}
    for weight, end in ((0.0, a), (1.0, b)):
        for lerp in (tree.lerp, jax.jit(tree.lerp)):
            assert np.asarray(lerp(a, b, weight)["x"]).tobytes() == np.asarray(end["x"]).tobytes()


# Folders.


@pytest.mark.parametrize("kind", DTYPES)
def test_residual_of_zero_steps_is_the_instruct_model_bit_for_bit(tmp_path, kind):
    base, instruct = model(0, kind, special=True), model(1, kind, special=True)
    save(tmp_path / "base", base)
    save(tmp_path / "continued", base, shard_bytes=100)
    save(tmp_path / "instruct", instruct, shard_bytes=150)
    assert len(list((tmp_path / "instruct").glob("*.safetensors"))) > 1
    same_bits(residual(tmp_path), instruct)


@pytest.mark.parametrize("kind", DTYPES)
def test_residual_matches_float64(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(arithmetic, "CHUNK", 2 * WIDTH)  # several pieces, the last one short
    made = three(tmp_path, kind)
    (tmp_path / "instruct" / "generation_config.json").write_text('{"top_k": 7}')
    got = residual(tmp_path, scale=0.5)
    for name, tensor in got.items():
        i, c, b = (made[k][name].astype(np.float64) for k in ("instruct", "continued", "base"))
        tolerance = 3e-7 if kind == "float32" else float(ml_dtypes.finfo(kind).eps)
        want = i + 0.5 * (c - b)
        np.testing.assert_allclose(tensor.astype(np.float64), want, atol=tolerance, rtol=tolerance)
        assert tensor.dtype == kind
    assert files.config(tmp_path / "out", "generation_config.json") == {"top_k": 7}
    assert files.config(tmp_path / "out")["model_type"] == "llama"
    assert files.config(tmp_path / "out", "jaxcl.json")["scale"] == 0.5


def test_the_difference_of_bfloat16_is_not_rounded():
    """258 - 1 is 257, which bfloat16 does not have: rounded to 256, the change of -256 would be 0 and not 1."""
    c, b, i = (np.array([number], ml_dtypes.bfloat16) for number in (258, 1, -256))
    np.testing.assert_array_equal(arithmetic.residual(i, c, b).astype(np.float32), [1.0])
    np.testing.assert_array_equal(jax.jit(tree.residual)(*map(jnp.asarray, (c, b, i))).astype(np.float32), [1.0])


def test_residuals_add_up(tmp_path):
    made = three(tmp_path)
    both = {n: 2 * made["continued"][n] - made["base"][n] for n in made["base"]}  # the same change twice
    save(tmp_path / "twice", both)
    one = residual(tmp_path, "one")
    shutil.move(tmp_path / "instruct", tmp_path / "first")
    shutil.move(tmp_path / "one", tmp_path / "instruct")
    again = residual(tmp_path, "again")
    run("residual", tmp_path / "twice", tmp_path / "sum", f"--base={tmp_path}/base", f"--instruct={tmp_path}/first")
    for name, tensor in load(tmp_path / "sum").items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-6)
        assert np.abs(again[name] - one[name]).max() > 0.01


def test_residual_commutes_with_a_low_rank_change(tmp_path):
    made = three(tmp_path)
    rng = np.random.default_rng(5)
    change = (rng.normal(size=(5, 2)) @ rng.normal(size=(2, WIDTH))).astype(np.float32)
    after = residual(tmp_path)[UP] + change
    shutil.rmtree(tmp_path / "continued")
    save(tmp_path / "continued", made["continued"] | {UP: made["continued"][UP] + change})
    np.testing.assert_allclose(residual(tmp_path, "other")[UP], after, atol=2e-6)


@pytest.mark.parametrize("kind", DTYPES)
def test_add_subtract_and_lerp(tmp_path, kind):
    a, b = model(0, kind, special=True), model(1, kind)
    save(tmp_path / "a", a)
    save(tmp_path / "b", b, shard_bytes=100)
    run("lerp", tmp_path / "a", tmp_path / "b", tmp_path / "l0", "--weight=0")
    run("lerp", tmp_path / "a", tmp_path / "b", tmp_path / "l1", "--weight=1")
    same_bits(load(tmp_path / "l0"), a)
    same_bits(load(tmp_path / "l1"), b)
    plain = model(2, kind)
    save(tmp_path / "c", plain)
    run("lerp", tmp_path / "c", tmp_path / "b", tmp_path / "l", "--weight=0.3")
    run("subtract", tmp_path / "c", tmp_path / "b", tmp_path / "s")
    run("add", tmp_path / "c", tmp_path / "b", tmp_path / "p", "--scale=-2")
    x, y = plain[UP].astype(np.float64), b[UP].astype(np.float64)
    tolerance = 1e-6 if kind == "float32" else 2 * float(ml_dtypes.finfo(kind).eps)
    for out, want in (("l", 0.7 * x + 0.3 * y), ("s", x - y), ("p", x - 2 * y)):
        got = load(tmp_path / out)[UP]
        assert got.dtype == kind
        np.testing.assert_allclose(got.astype(np.float64), want, atol=tolerance, rtol=tolerance)


BASE_WORDS = ["<unk>", "a", "b", "c", "d", "e", "f", "g"]
CHAT_WORDS = ["<unk>", "<user>", "b", "a", "c", "d", "f", "e", "g", "<bot>"]  # moved, and two of its own


@pytest.mark.parametrize("chunk", [2**20, 2 * WIDTH])
def test_rows_are_matched_by_token(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(arithmetic, "CHUNK", chunk)
    base, instruct = model(0, rows=8), model(1, rows=11)  # a last row without a token
    continued = moved(base, 2)
    save(tmp_path / "base", base, BASE_WORDS)
    save(tmp_path / "continued", continued, BASE_WORDS)
    save(tmp_path / "instruct", instruct, CHAT_WORDS)
    got = residual(tmp_path)
    for name in (EMBED, HEAD):
        for i, token in enumerate([*CHAT_WORDS, None]):
            if token in BASE_WORDS:
                row = BASE_WORDS.index(token)
                np.testing.assert_allclose(
                    got[name][i], instruct[name][i] + (continued[name][row] - base[name][row]), atol=1e-6
                )
                assert not np.array_equal(got[name][i], instruct[name][i])
            else:
                assert got[name][i].tobytes() == instruct[name][i].tobytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "instruct/tokenizer.json").read_bytes()


def test_rows_are_matched_by_number_where_the_tokenizers_are_the_same(tmp_path, monkeypatch):
    made = three(tmp_path, tokens=BASE_WORDS)
    monkeypatch.setattr(arithmetic, "_vocabulary", None)  # the cheap path reads none
    np.testing.assert_allclose(
        residual(tmp_path)[EMBED],
        made["instruct"][EMBED] + made["continued"][EMBED] - made["base"][EMBED],
        atol=1e-6,
    )


def test_a_tied_head_is_written_once(tmp_path):
    made = three(tmp_path, tie_word_embeddings=True)  # the files hold a copy of it
    shutil.rmtree(tmp_path / "base")
    save(tmp_path / "base", {n: t for n, t in made["base"].items() if n != HEAD}, tie_word_embeddings=True)
    assert HEAD not in residual(tmp_path)


# Bad input.


def broken(tmp_path, case):
    """Spoils one thing; returns the arguments and a word of the message."""
    made = three(tmp_path)
    place = {"missing": "base", "shape": "continued", "family": "base", "rows": "instruct", "run": "continued"}.get(
        case
    )
    spoiled = {
        "missing": ({n: t for n, t in made["base"].items() if n != UP}, {}, UP),
        "shape": (made["continued"] | {UP: np.zeros((4, WIDTH), np.float32)}, {}, "one size"),
        "family": (made["base"], {"model_type": "qwen2"}, "one family"),
        "rows": (model(1, rows=12), {}, "without the tokenizers"),
        "nan": (made["continued"] | {UP: np.full((5, WIDTH), np.nan, np.float32)}, {}, "not finite"),
        "quantised": (made["base"], {"quantization_config": {"bits": 4}}, "quantised"),
    }.get(case)
    place = {"nan": "continued", "quantised": "base"}.get(case, place)
    out, word = tmp_path / "out", ""
    if spoiled:
        shutil.rmtree(tmp_path / place)
        save(tmp_path / place, spoiled[0], **spoiled[1])
        word = spoiled[2]
    elif case == "run":
        (tmp_path / "continued/run.json").write_text("{}")
        word = "python -m jaxcl.hf export"
    elif case == "exists":
        out.mkdir()
        word = "exists"
    elif case == "inside":
        out, word = tmp_path / "base/out", "lies in the input"
    elif case == "absent":
        shutil.rmtree(tmp_path / "base")
        word = "no such file"
    elif case == "tokenizer":
        for name, tokens in (
            ("base", BASE_WORDS),
            ("continued", BASE_WORDS),
            ("instruct", [str(i) for i in range(12)]),
        ):
            words(tmp_path / name / "tokenizer.json", tokens)
        word = "do not belong together"
    argv = ["residual", tmp_path / "continued", out, f"--base={tmp_path}/base", f"--instruct={tmp_path}/instruct"]
    return ([*argv, "--scale=nan"], "--scale") if case == "scale" else (argv, word)


CASES = [
    "missing",
    "shape",
    "family",
    "rows",
    "nan",
    "quantised",
    "run",
    "exists",
    "inside",
    "absent",
    "tokenizer",
    "scale",
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    argv, word = broken(tmp_path, case)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as found:
        run(*argv)
    assert word in str(found.value)
    assert "\n" not in str(found.value)
    assert sorted(tmp_path.rglob("*")) == before


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 2}, r"num_attention_heads=2, but 4 in .*instruct"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads=1, but 4 in "),
        ({"rms_norm_eps": 1e-2}, r"rms_norm_eps=0\.01, but 1e-0[56] in "),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5, but None in "),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings=True, but False in "),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu', but 'silu' in "),
        ({"rope_theta": 1e6}, r"rope_theta=1000000\.0, but 10000\.0 in "),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_theta=500000\.0, but 10000\.0"),
        ({"rope_scaling": LLAMA3}, r"rope_scaling=\{'kind': 'llama3'.*'factor': 8\.0.*\}, but None in "),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope_scaling=\{'kind': 'dynamic', 'factor': 2\.0\}, but",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["residual", "add", "subtract", "lerp"])
def test_models_that_compute_otherwise_are_refused_although_their_shapes_agree(tmp_path, verb, fields, words):
    made = three(tmp_path, num_attention_heads=4)
    shutil.rmtree(tmp_path / "base")
    save(tmp_path / "base", made["base"], **{"num_attention_heads": 4} | fields)
    before = sorted(tmp_path.rglob("*"))
    argv = [verb, tmp_path / "instruct", tmp_path / "base", tmp_path / "out", "--weight=0.5"]
    if verb == "residual":
        argv = [verb, tmp_path / "continued", argv[3], f"--base={argv[2]}", f"--instruct={argv[1]}"]
    with pytest.raises(UserError, match=rf"base/config\.json: {words}") as found:
        run(*argv[: None if verb in ("residual", "lerp") else 4])
    assert "\n" not in str(found.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_two_notations_of_the_same_model_are_combined(tmp_path, kind):
    """transformers 4 beside 5, and fields that one of them leaves at their default."""
    old = {"num_attention_heads": 4, "rope_theta": 1e4, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    del old["rope_scaling"]["rope_type"]
    new = {"num_attention_heads": 4, "num_key_value_heads": 4, "rope_parameters": LLAMA3 | {"rope_theta": 10_000}}
    if kind == "llama":
        new["hidden_act"] = "silu"
    for name, fields in (("a", old), ("b", new)):
        save(tmp_path / name, model(0), model_type=kind, **fields)
    run("add", tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert files.config(tmp_path / "out")["rope_theta"] == 1e4


def test_too_small_a_disk_is_found_first(tmp_path, monkeypatch):
    three(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 600))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as found:
        residual(tmp_path)
    assert found.value.filename == str(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_exits_with_two(tmp_path):
    argv = [sys.executable, "-m", "jaxcl.hf", "add", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'a'}")
    assert done.stderr.count("\n") == 1


# The writer.


def test_shards_are_valid_files(tmp_path):
    from safetensors.numpy import load_file

    tensors = {"half": np.arange(3).astype(np.float16), "whole": np.float32([1, 2]), "one": np.float32(7)}
    with write.Writer(tmp_path / "out") as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
    index = json.loads((tmp_path / "out" / files.INDEX).read_text())  # three halves leave no place for a float
    assert index["metadata"] == {"total_size": 18, "total_parameters": 6}
    held = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    same_bits(held, {name: np.asarray(t) for name, t in tensors.items()})


def test_a_table_that_is_full_opens_a_shard(tmp_path):
    tensors = {f"{'n' * 200}.{i}": np.float32([i]) for i in range(400)}
    same_bits(load(save(tmp_path / "out", tensors)), tensors)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_a_full_disk_leaves_nothing_and_names_the_folder(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "_sync", full)
    with pytest.raises(OSError, match="No space") as found:
        save(tmp_path / "out", model(0))
    assert found.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


MEASURE = """
import threading, sys, pathlib
from jaxcl.hf import arithmetic
def held():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) * 1024
out = pathlib.Path(sys.argv[1])
arithmetic.combine(out / 'a', [out / 'a', out / 'a'], out / 'first', arithmetic.residual, {})  # imports, buffers
before, peak, over = held(), [0], threading.Event()
def watch():
    while not over.wait(0.002):
        peak[0] = max(peak[0], held())
thread = threading.Thread(target=watch)
thread.start()
arithmetic.combine(out / 'i', [out / 'c', out / 'b'], out / 'out', arithmetic.residual, {})
over.set(); thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Twelve tensors of 8 MiB in each of three folders: the process grows by less than four of them."""
    size = 2**21
    save(tmp_path / "a", {"x": np.ones((16, 16), np.float32)})
    for seed, name in enumerate("icb"):
        rng = np.random.default_rng(seed)
        with write.Writer(tmp_path / name) as out:
            for i in range(12):
                out.add(f"t{i}", rng.random((size // 512, 512), np.float32))
            out.json("config.json", {"model_type": "llama"})
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 4 * size + 2**25  # and the pieces of CHUNK elements


def test_the_continued_model_is_compared_too(tmp_path):
    made = three(tmp_path)
    shutil.rmtree(tmp_path / "continued")
    save(tmp_path / "continued", made["continued"], rope_theta=1e6)
    with pytest.raises(UserError, match=r"rope_theta="):
        residual(tmp_path)
    assert not (tmp_path / "out").exists()


def test_windows_and_fields_of_other_families_are_compared():
    known = {"model_type": "mistral", "num_hidden_layers": 2, "num_attention_heads": 4}
    assert families.unseen(known | {"sliding_window": 4}, "x")["sliding_window"] == {"window": 4}
    assert families.unseen(known | {"sliding_window": 8}, "x") != families.unseen(known | {"sliding_window": 4}, "x")
    foreign = {"model_type": "gemma2", "num_attention_heads": 4, "hidden_activation": "gelu"}
    assert families.unseen(foreign, "x")["hidden_act"] == "gelu"
    for change in ({"query_pre_attn_scalar": 64}, {"layer_types": ["full_attention"]}, {"hidden_activation": "silu"}):
        assert families.unseen(foreign | change, "x") != families.unseen(foreign, "x")
    assert families.unseen(foreign | {"query_pre_attn_scalar": None}, "x") == families.unseen(foreign, "x")
