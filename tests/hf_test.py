"""Checkpoints in the format of Hugging Face: recorded models of every family, both ways."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcl import generate
from jaxcl import mesh as meshes
from jaxcl.hf import axes, families, files, read, write
from jaxcl.models import transformer
from jaxcl.models.config import resolve
from jaxcl.schema import UserError
from jaxcl.types import Batch, TrainState

FIXTURES = Path(__file__).parent / "fixtures" / "hf"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def rows(tokens):
    zeros = np.zeros(tokens.shape, np.int32)
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens.astype(np.int32), zeros, np.ones(tokens.shape, np.float32), zeros + 1, place, zeros[:, 0])


def load(folder, sharding=None, dtype=np.float32, **fields):
    config = resolve(read.fields(folder) | fields)
    model = transformer.from_config(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if sharding:
        abstract = meshes.with_shardings(shapes, jax.tree.map(sharding, shapes))
    else:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return config, model, read.load(folder, config, abstract)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    config, model, params = load(FIXTURES / name, vocab_multiple=16)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    logits = jax.jit(lambda p, b: model.apply(p, b).logits)(params, rows(expected["tokens"]))
    assert logits.shape[-1] == config.vocab
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert np.std(expected["logits"]) > 0.5


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuations_are_those_of_transformers(name):
    _, model, params = load(FIXTURES / name, vocab_multiple=16)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    prompt = expected["prompt"].astype(np.int32)
    run = jax.jit(lambda p, tokens: generate.greedy(model, p, tokens, jnp.ones_like(tokens), 12, jnp.array([-1])))
    np.testing.assert_array_equal(run(params, prompt), expected["greedy"])
    assert len(set(expected["greedy"][0].tolist())) > 3


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    """import(export(p)) == p, and the tensors are bit for bit those of the folder they came from."""
    dtype = read.stored_dtype(FIXTURES / name)
    config, _, params = load(FIXTURES / name, vocab_multiple=16)
    original = files.config(FIXTURES / name)
    kind = families.family(original, name)
    for described in (original, {}):  # brought up to date, and made from our fields alone
        out = tmp_path / f"out{len(described)}"
        with write.Writer(out, shard_bytes=4000) as writer:
            for tensor in write.tensors(params, config, kind, dtype):
                writer.add(*tensor)
            writer.json("config.json", families.config(config, described))
        again = load(out, vocab_multiple=16)
        assert again[0] == config
        jax.tree.map(np.testing.assert_array_equal, again[2], params)
    before, after = files.open_folder(FIXTURES / name), files.open_folder(out)
    assert set(before.file_of) == set(after.file_of)
    for tensor in before.file_of:
        assert before.dtype(tensor) == after.dtype(tensor)
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes()
    index = json.loads((out / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(before.read(tensor).nbytes for tensor in before.file_of)
    assert all((out / file).stat().st_size < 9_000 for file in index["weight_map"].values())


@pytest.mark.parametrize("name", ["qwen2", "llama_bias", "qwen3_tied"])
def test_every_device_reads_only_its_piece(name, monkeypatch):
    """Over fsdp x tensor the pieces make up the whole, and no read is larger than a piece of a layer."""
    mesh = meshes.make(fsdp=2, tensor=4)
    config, model, whole = load(FIXTURES / name, vocab_multiple=16)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    sharding = meshes.state_shardings(mesh, model.axes, transformer_state(shapes)).params
    sizes = []
    plain = files.Tensors.read

    def counted(self, tensor, where=None):
        out = plain(self, tensor, where)
        sizes.append((out.size, np.prod(self.shape(tensor)), tensor))
        return out

    monkeypatch.setattr(files.Tensors, "read", counted)
    cut = read.load(FIXTURES / name, config, meshes.with_shardings(shapes, sharding))
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    assert not cut["layers"]["mlp"]["up"].is_fully_replicated
    up = [part / total for part, total, tensor in sizes if "up_proj.weight" in tensor]
    assert max(up) == pytest.approx(1 / 8)
    table = [part / total for part, total, tensor in sizes if "embed_tokens" in tensor]
    assert max(table) <= 1 / 4


def transformer_state(params):
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, ())


def test_a_piece_of_merged_axes_is_the_piece_of_the_whole():
    rng = np.random.default_rng(0)
    tensor = rng.normal(size=(4 * 6, 10))
    parsed = axes.parse("(heads head) embed -> embed heads head")
    whole = axes.to_ours(parsed, tensor, {"heads": 4, "head": 6, "embed": 10})
    np.testing.assert_array_equal(whole[3, 2, 5], tensor[2 * 6 + 5, 3])
    np.testing.assert_array_equal(axes.to_theirs(parsed, whole), tensor)
    for index in [(slice(2, 7), slice(1, 3), slice(None)), (slice(None), slice(0, 4), slice(2, 5))]:
        where, sizes, kept = axes.piece(parsed, whole.shape, index)
        np.testing.assert_array_equal(axes.to_ours(parsed, tensor[where], sizes)[kept], whole[index])


def old_notation(config):
    """The same config.json as transformers 4 wrote it."""
    rope = dict(config.pop("rope_parameters"))
    kind = rope.pop("rope_type")
    config["torch_dtype"] = config.pop("dtype")
    return config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": kind, **rope} if rope else None}


@pytest.mark.parametrize("name", CASES)
def test_the_notation_of_transformers_4_means_the_same(name):
    config = files.config(FIXTURES / name)
    assert families.fields(old_notation(dict(config)), "config.json") == families.fields(config, "config.json")
    assert ("rope_scaling" in families.fields(config, "config.json")) == ("factor" in config["rope_parameters"])


# What the configuration classes of transformers 5.23 say if config.json does not.
DEFAULTS = {
    "llama": {"norm_eps": 1e-6, "max_length": 2048},
    "mistral": {"norm_eps": 1e-6, "max_length": 131_072, "window": 4096},
    "qwen2": {"norm_eps": 1e-6, "max_length": 32_768, "qkv_bias": True},
    "qwen3": {"norm_eps": 1e-6, "max_length": 32_768, "qk_norm": True, "head_dim": 128},
}


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_fields_that_a_config_leaves_out(kind):
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    found = families.fields({"model_type": kind, **dict.fromkeys(sizes, 8)}, "config.json")
    plain = {"vocab": 8, "layers": 8, "embed": 8, "heads": 8, "mlp": 8, "rope_theta": 10_000.0, "qk_norm": False}
    off = dict.fromkeys(("tied", "qkv_bias", "out_bias", "mlp_bias"), False)
    assert off | found == off | plain | DEFAULTS[kind]


def test_a_window_of_null_is_none():
    config = files.config(FIXTURES / "mistral_head_dim")
    assert config["sliding_window"] is None
    assert "window" not in families.fields(config, "config.json")


def test_max_window_layers_counts_where_no_layer_has_a_type(tmp_path):
    config = files.config(FIXTURES / "qwen2_window")
    assert config["max_window_layers"] == 1
    listed = families.fields(config, "config.json")
    assert listed["window_layers"] == [False, True, True]
    del config["layer_types"]
    assert families.fields(config, "config.json") == listed


def test_a_head_that_is_tied_may_be_stored_only_if_it_is_the_embedding(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "llama_tied", tmp_path / "model"))
    rewrite(folder / files.SINGLE, lambda t: t.update({read.HEAD: t[read.EMBEDDING].copy()}))
    load(folder)
    rewrite(folder / files.SINGLE, lambda t: t[read.HEAD].__setitem__((60, 3), 7.0))
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load(folder)


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FIXTURES / "llama_sharded", tmp_path / "model"))


def edited(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def shard(folder, number):
    return folder / f"model-{number:05}-of-00003.safetensors"


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGES = {
    "family": (lambda f: edited(f, model_type="gpt_neox"), r"config.json: model_type='gpt_neox' is no family"),
    "activation": (lambda f: edited(f, hidden_act="gelu"), r"hidden_act='gelu'"),
    "rotary": (lambda f: edited(f, partial_rotary_factor=0.5), r"partial_rotary_factor=0.5"),
    "rope": (lambda f: edited(f, rope_scaling={"rope_type": "longrope", "factor": 2}), r"rope_type='longrope'"),
    "rope kind": (lambda f: edited(f, rope_scaling="linear"), r"rope_scaling='linear': must be an object"),
    "rope number": (
        lambda f: edited(f, rope_scaling={"rope_type": "linear", "factor": "two"}),
        r"config.json: its RoPE has values that are no numbers",
    ),
    "rope share": (
        lambda f: edited(f, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor=0.5",
    ),
    "fewer rows": (
        lambda f: edited(f, vocab_size=75),
        r"embed_tokens.*is \[73, 16\], but config.json means \[75, 16\]",
    ),
    "rope field": (lambda f: edited(f, rope_scaling={"rope_type": "linear"}), r"linear RoPE scaling lacks 'factor'"),
    "attention": (lambda f: edited(f, layer_types=["linear_attention"] * 2), r"layer_types has 'linear_attention'"),
    "quantised": (lambda f: edited(f, quantization_config={"bits": 4}), r"quantised weights cannot be trained"),
    "field": (lambda f: edited(f, hidden_size="absent"), r"config.json: has no 'hidden_size'"),
    "config": (lambda f: (f / "config.json").write_text("{"), r"config.json: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json: no such file"),
    "missing": (lambda f: shard(f, 3).unlink(), r"model-00003-of-00003.safetensors: no such file"),
    "cut": (lambda f: shard(f, 2).write_bytes(shard(f, 2).read_bytes()[:-9]), r"model-00002.*damaged or cut short"),
    "noise": (lambda f: shard(f, 2).write_bytes(b"\xff" * 99), r"model-00002.*damaged or cut short"),
    "empty": (lambda f: shard(f, 2).write_bytes(b""), r"model-00002.*damaged or cut short"),
    "index": (lambda f: (f / files.INDEX).write_text('{"a": 1}'), r"has no weight_map"),
    "outside": (
        lambda f: (f / files.INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        r"names '../a.safetensors', which is no file of its folder",
    ),
    "shape": (lambda f: edited(f, intermediate_size=48), r"mlp.*is \[20, 16\], but config.json means \[48, 16\]"),
    "vocabulary": (
        lambda f: edited(f, vocab_size=60),
        r"embed_tokens.*is \[73, 16\], but config.json means \[60, 16\]",
    ),
    "layers": (lambda f: edited(f, num_hidden_layers=3), r"has no tensor 'model.layers.2"),
    "left over": (lambda f: edited(f, num_hidden_layers=1), r"model.layers.1.*has no place"),
    "type": (
        lambda f: rewrite(shard(f, 3), lambda t: t.update({k: v.astype(np.int8) for k, v in t.items()})),
        r"is I8; jaxcl reads F32",
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_checkpoint_that_is_not_sound_is_refused_in_one_line(copy, damage):
    change, words = DAMAGES[damage]
    change(copy)
    with pytest.raises(UserError, match=words) as caught:
        load(copy, vocab_multiple=128)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_pickles_are_never_loaded(tmp_path, copy):
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"only pytorch_model.bin, a pickle, which is never loaded"):
        load(copy)


def test_a_folder_that_is_being_written_is_not_there(tmp_path):
    out = tmp_path / "out"

    def stopped():
        with write.Writer(out) as writer:
            writer.add("a", np.ones(3, ml_dtypes.bfloat16))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(UserError, match="exists; choose another folder"):
        write.Writer(out)
