"""A run that starts from a Hugging Face folder and becomes one: through the command line's own functions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tokenizers

from jaxcl import bpe, mesh, network, train, weights
from jaxcl import folder as folders
from jaxcl.hf import files
from jaxcl.hf.__main__ import export
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import TrainState


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "hf_run"


def settings(folder, **overrides):
    plain = {"method": "cpt", "evaluation": {"every": 8, "rows": 8}, "stream__replay": None}
    made = small.config(folder, **plain | overrides)
    for source in made["sources"].values():
        source["licence"] = "CC0-1.0"
    return made


@pytest.fixture(scope="module")
def trunk(folder):
    """A run from the beginning, and what it exports."""
    workdir = folder / "trunk"
    assert train.run(settings(folder), str(workdir), final=False) == 0
    export(workdir, folder / "exported")
    return workdir, folder / "exported"


def continued(folder, exported, **overrides):
    return settings(folder, model={"checkpoint": str(exported)}, **overrides)


def test_a_run_goes_on_from_what_another_exported(folder, trunk, tmp_path):
    """Same model, same tokenizer, same loss to the last bit; the second export of no steps is the first."""
    workdir, exported = trunk
    config = continued(folder, exported, stream__steps=1)
    assert train.run(config, str(tmp_path / "next"), final=False) == 0
    last, first = small.records(workdir, "eval")[-1], small.records(tmp_path / "next", "eval")[0]
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-6)
    begun = weights.load(tmp_path / "next", step=0)
    ended = weights.load(workdir)
    assert begun.network.checkpoint == str(exported)
    assert begun.params["embedding"].shape == (384, 16)  # 259 tokens, padded to a multiple of 128
    rows = begun.network.shape.vocab
    for (name, ours), (_, theirs) in zip(named_leaves(begun.params), named_leaves(ended.params), strict=True):
        cut = (slice(rows),) if name == "embedding" else ()
        np.testing.assert_array_equal(ours[cut], theirs[cut])
    export(tmp_path / "next", tmp_path / "again", step=0)
    before, after = files.open_folder(exported), files.open_folder(tmp_path / "again")
    assert set(before.file_of) == set(after.file_of)
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.file_of)
    export(tmp_path / "next", tmp_path / "trained")
    trained = files.open_folder(tmp_path / "trained")
    assert any(before.read(name).tobytes() != trained.read(name).tobytes() for name in before.file_of)


def test_it_resumes_without_reading_the_folder_again(folder, trunk, tmp_path, monkeypatch):
    _, exported = trunk
    own = Path(shutil.copytree(exported, tmp_path / "model"))
    config = continued(folder, own, stream__steps=4)
    with monkeypatch.context() as patch:
        small.strike(patch, "SIGTERM", 1, "account")
        assert train.run(config, str(tmp_path / "run"), final=False) == 0
    for path in own.glob("*.safetensors"):
        path.unlink()
    assert train.run(config, str(tmp_path / "run"), final=False) == 0
    assert train.run(continued(folder, exported, stream__steps=4), str(tmp_path / "straight"), final=False) == 0
    assert small.checkpoint(tmp_path / "run")[1] == small.checkpoint(tmp_path / "straight")[1]


def test_the_folder_says_what_it_is(trunk, tmp_path):
    workdir, exported = trunk
    config = files.config(exported)
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 264
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    assert files.config(exported, "generation_config.json")["eos_token_id"] == 257
    tok = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    text = "naïve — 日本 \x00\x7f"
    assert tok.encode(text).ids == list(text.encode())
    assert tok.decode(tok.encode(text).ids) == text
    told = files.config(exported, "jaxcl.json")
    assert told["step"] == small.TOTAL
    assert set(told["sources"]) == {"d0", "d1", "d2"}
    ledger = small.records(workdir, "ledger")
    assert {name: entry["consumed"] for name, entry in told["sources"].items()} == ledger[-1]["sources"]
    facts = folders.about(workdir)["facts"]["sources"]
    for name, entry in told["sources"].items():
        assert entry["train"]["fingerprint"] == facts[name]["train"]["fingerprint"]
        assert entry["licence"] == "CC0-1.0"
    export(workdir, tmp_path / "early", step=18)
    early = files.config(tmp_path / "early", "jaxcl.json")
    assert early["step"] == 18
    assert early["sources"]["d2"]["consumed"]["new_rows"] < told["sources"]["d2"]["consumed"]["new_rows"]


def test_an_export_keeps_tokenizer_type_and_ends_of_what_it_came_from(folder, trunk, tmp_path):
    """A BPE, bfloat16, several end tokens and options of generation, as released models have them."""
    texts = [str(path) for path in (folder / "text").glob("*.txt")]
    bpe.main([str(tmp_path / "words"), "--vocab=264", *texts])
    export(trunk[0], tmp_path / "source", dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "words" / name, tmp_path / "source" / name)
    for name, more in (("config.json", {"eos_token_id": [1, 5]}), ("generation_config.json", {"top_k": 7})):
        path = tmp_path / "source" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert train.run(continued(folder, tmp_path / "source", stream__steps=1), str(tmp_path / "run"), final=False) == 0
    export(tmp_path / "run", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "words" / name).read_bytes()
    assert files.config(tmp_path / "out")["eos_token_id"] == [1, 5]
    assert files.config(tmp_path / "out", "generation_config.json")["top_k"] == 7
    assert files.open_folder(tmp_path / "out").dtype("model.norm.weight") == "BF16"


BAD = {
    "no folder": ({"model": {"checkpoint": "nowhere"}}, r"nowhere/config.json: no such file"),
    "no path": ({"model": {"checkpoint": ""}}, r"config.model.checkpoint='': give the folder"),
    "shape": ({"model": {"checkpoint": "EXPORTED", "layers": 3}}, r"config.model.layers: is given by the checkpoint"),
    "fewer rows": (
        {"model": {"checkpoint": "EXPORTED", "vocab": 263}},
        r"config.model.vocab=263.*rows are never removed",
    ),
    "preset": ({"model": {"checkpoint": "EXPORTED", "preset": "tiny"}}, r"config.model.preset: is given by"),
    "long rows": ({"model": {"checkpoint": "EXPORTED"}, "packing__length": 600}, r"config.model.max_length=512"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_line_and_nothing_is_written(folder, trunk, tmp_path, case):
    overrides, words = BAD[case]
    config = json.loads(json.dumps(settings(folder, **overrides)).replace("EXPORTED", str(trunk[1])))
    with pytest.raises(UserError, match=words) as caught:
        train.run(config, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder, trunk, tmp_path):
    own = Path(shutil.copytree(trunk[1], tmp_path / "model"))
    tok = tokenizers.Tokenizer.from_file(str(own / "tokenizer.json"))
    tok.add_special_tokens([f"<|new {i}|>" for i in range(6)])  # 265 tokens, 264 rows
    tok.save(str(own / "tokenizer.json"))
    with pytest.raises(UserError, match=r"vocab=264: the tokenizer 'hf' has 265 tokens;.*config.model.vocab=265"):
        train.run(continued(folder, own), str(tmp_path / "run"))


def test_an_embedding_grows_for_tokens_that_the_checkpoint_lacks(folder, trunk):
    own = files.open_folder(trunk[1]).read("model.embed_tokens.weight").astype(np.float64)
    words = network.tokenizer_of(None, {"checkpoint": str(trunk[1])})
    found = {}
    for how in ("mean", "normal"):
        made = network.make({"checkpoint": str(trunk[1]), "vocab": 300, "new_rows": how}, words, 32)
        devices = mesh.make(tensor=2, fsdp=2, data=2)
        shapes = jax.eval_shape(made.model.init, jax.random.key(0))
        shardings = mesh.state_shardings(devices, made.model.axes, TrainState(jnp.int32(0), shapes, ())).params
        params = made.load(jax.random.key(1), mesh.with_shardings(shapes, shardings))
        assert params["embedding"].sharding == shardings["embedding"]
        found[how] = np.asarray(params["embedding"], np.float64)
        assert found[how].shape == (384, 16)
        np.testing.assert_array_equal(found[how][: len(own)], own)
        assert not np.any(found[how][300:])
    np.testing.assert_allclose(found["mean"][len(own) : 300], np.tile(own.mean(axis=0), (300 - len(own), 1)), atol=1e-7)
    assert len(np.unique(found["normal"][len(own) : 300], axis=0)) == 300 - len(own)
    with pytest.raises(UserError, match=r"config.model.new_rows='median': unknown"):
        network.make({"checkpoint": str(trunk[1]), "new_rows": "median"}, words, 32)


def test_the_command_exports_and_refuses(trunk, tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "jaxcl.hf", "export", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, env={"JAX_PLATFORMS": "cpu"})

    done = command(trunk[0], tmp_path / "out", "--dtype=bfloat16", f"--step={small.TOTAL}")
    assert done.returncode == 0, done.stderr
    assert "AutoModelForCausalLM" in done.stdout
    assert files.open_folder(tmp_path / "out").dtype("model.norm.weight") == "BF16"
    for arguments, words in [
        ((trunk[0], tmp_path / "out"), "out: exists"),
        ((tmp_path / "none", tmp_path / "x"), "none: not the folder of a run"),
        ((trunk[0], tmp_path / "x", "--step=5"), "no checkpoint at step 5; it has"),
    ]:
        failed = command(*arguments)
        assert failed.returncode == 2
        assert len(failed.stderr.splitlines()) == 1
        assert words in failed.stderr
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("how", ["mean", "normal"])
def test_a_larger_vocabulary_gets_rows_and_keeps_the_old_ones(folder, trunk, tmp_path, how):
    """Through training and back: rows of tokens that the tokenizer has only now, and no change of the rest."""
    exported = trunk[1]
    old = files.open_folder(exported).read("model.embed_tokens.weight")
    model = {"checkpoint": str(exported), "vocab": 270, "new_rows": how}
    assert train.run(settings(folder, model=model, stream__steps=1), str(tmp_path / "run"), final=False) == 0
    begun = np.asarray(weights.load(tmp_path / "run", step=0).params["embedding"])
    assert begun.shape == (384, 16)
    np.testing.assert_array_equal(begun[:264], old)
    np.testing.assert_array_equal(begun[270:], 0)
    if how == "mean":
        np.testing.assert_allclose(begun[264:270], np.tile(old.mean(0), (6, 1)), atol=1e-6)
    else:
        assert np.linalg.matrix_rank(begun[264:270] - old.mean(0)) == 6
    _, leaves, _ = small.checkpoint(tmp_path / "run")
    moments = [shape for name, (shape, *_) in leaves.items() if name.endswith("mu/embedding")]
    assert moments == [[384, 16]]
    export(tmp_path / "run", tmp_path / "out")
    assert files.config(tmp_path / "out")["vocab_size"] == 270
    assert files.open_folder(tmp_path / "out").shape("model.embed_tokens.weight") == (270, 16)
    with pytest.raises(UserError, match=r"config.model.new_rows='men'"):
        train.run(settings(folder, model=model | {"new_rows": "men"}), str(tmp_path / "none"))
