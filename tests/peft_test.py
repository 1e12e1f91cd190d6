"""Adapters in the format of PEFT, against what PEFT itself made (experiments/fixtures/peft_adapter.py)."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toys

from jaxcl import network
from jaxcl.data import tokenizer
from jaxcl.hf import files, peft, read
from jaxcl.models import lora, transformer
from jaxcl.models.config import resolve
from jaxcl.schema import UserError
from jaxcl.types import Batch

FIXTURE = Path(__file__).parent / "fixtures" / "peft"


def loaded(folder=FIXTURE / "adapter"):
    """Returns the model and the parameters of the fixture with the adapter in `folder`."""
    config = resolve(read.fields(FIXTURE / "base"))
    plain = transformer.from_config(config)
    found = peft.options(folder)
    model = lora.make(plain, **found)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    base = read.load(FIXTURE / "base", config, shapes["base"])
    return model, {"base": base, "lora": peft.load(folder, shapes["lora"])}, found


def logits(model, params):
    tokens = np.load(FIXTURE / "logits.npz")["tokens"]
    row = np.ones(tokens.shape, np.int32)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = Batch(tokens, tokens, row.astype(np.float32), row, places, np.zeros(len(tokens), np.int32))
    return toys.quick(lambda p, b: model.apply(p, b).logits)(params, jax.tree.map(jax.numpy.asarray, batch))


def test_an_adapter_of_peft_gives_the_logits_of_peft():
    model, params, found = loaded()
    want = np.load(FIXTURE / "logits.npz")["logits"]
    np.testing.assert_allclose(logits(model, params), want, atol=1e-5)
    without = {"base": params["base"], "lora": jax.tree.map(lambda x: 0 * x, params["lora"])}
    assert np.abs(logits(model, without) - want).max() > 0.1
    names = ("attention/out", "attention/query", "attention/value", "mlp/down", "mlp/up")
    assert sorted(found.pop("targets")) == [f"layers/{name}$" for name in names]
    assert found == {"rank": 3, "alpha": 5.0, "dropout": 0.1}


def test_what_is_exported_is_what_peft_wrote(tmp_path):
    _, params, found = loaded()
    targets = found.pop("targets")
    peft.export(tmp_path / "out", params["lora"], **found, base="base")
    ours, theirs = (peft._open(folder) for folder in (tmp_path / "out", FIXTURE / "adapter"))
    assert set(ours.file_of) == set(theirs.file_of)
    for name in ours.file_of:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    config, original = (files.config(folder, peft.CONFIG) for folder in (tmp_path / "out", FIXTURE / "adapter"))
    assert sorted(config.pop("target_modules")) == sorted(original["target_modules"])
    assert config.items() <= original.items()
    _, again, options = loaded(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert sorted(options["targets"]) == sorted(targets)
    with pytest.raises(UserError, match="exists"):
        peft.export(tmp_path / "out", params["lora"], **found)


def edited(tmp_path, **changes):
    """Returns a copy of the adapter with another config."""
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURE / "adapter", folder)
    config = json.loads((folder / peft.CONFIG).read_text()) | changes
    (folder / peft.CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern="),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"r": None}, "r=None"),
    ],
)
def test_other_adapters_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=rf"adapter_config\.json: .*{words}"):
        peft.options(edited(tmp_path, **changes))


def test_the_scale_of_rslora_is_kept(tmp_path):
    assert peft.options(edited(tmp_path, use_rslora=True))["alpha"] == pytest.approx(5 * np.sqrt(3))


def rewritten(tmp_path, change):
    """Returns a copy of the adapter with other tensors."""
    from safetensors import numpy as safetensors

    folder = edited(tmp_path)
    tensors = safetensors.load_file(folder / peft.WEIGHTS)
    change(tensors)
    safetensors.save_file(tensors, folder / peft.WEIGHTS)
    return folder


def add(tensors, name):
    tensors[name] = np.zeros((3, 8), np.float32)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FIRST), f"has no tensor '{FIRST}'"),
        (lambda t: t.update({FIRST: t[FIRST][:, :-1]}), "is \\[3, 7\\], the model needs \\[3, 8\\]"),
        (lambda t: add(t, "base_model.model.lm_head.lora_A.weight"), "'base_model.model.lm_head.* has no place"),
        (lambda t: add(t, FIRST.replace(".0.", ".2.")), "layers.2.* has no place"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        loaded(rewritten(tmp_path, change))


def test_a_folder_without_tensors_is_named(tmp_path):
    folder = edited(tmp_path)
    (folder / peft.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle, which is never loaded"):
        peft.options(folder)
    with pytest.raises(UserError, match="no such file"):
        peft.options(tmp_path / "nowhere")


def test_a_network_takes_base_and_adapter_from_their_folders():
    """The base in the type of its files, the adapter in float32; contradictions are refused."""
    words = tokenizer.make()  # of bytes: the embedding grows to its 259 tokens
    options = {"checkpoint": str(FIXTURE / "base"), "vocab_multiple": 1, "vocab": 259}
    source = {"name": "lora", "checkpoint": str(FIXTURE / "adapter")}
    found = network.make(options, words, 8, source)
    shapes = jax.eval_shape(found.model.init, jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    params = found.load(jax.random.key(0), shapes)
    jax.tree.map(np.testing.assert_array_equal, params["lora"], loaded()[1]["lora"])
    np.testing.assert_array_equal(params["base"]["embedding"][:16], loaded()[1]["base"]["embedding"])
    for key, value in (("rank", 8), ("alpha", 1.0), ("targets", ["query"])):
        with pytest.raises(UserError, match=rf"config\.adapter\.{key}=.*leave it out"):
            network.make(options, words, 8, source | {key: value})
    assert network.make(options, words, 8, source | {"dropout": 0.5}).adapter.dropout == 0.5
    with pytest.raises(UserError, match=r"adapter.name='dora'"):
        network.make(options, words, 8, "dora")
    with pytest.raises(UserError, match=r"adapter.rnk: unknown key; did you mean 'rank'"):
        network.make(options, words, 8, {"name": "lora", "rnk": 8})


def test_the_base_is_found_from_the_folder_of_the_adapter(tmp_path, monkeypatch):
    """A relative path means the same wherever the command is started; what is not there is one line."""
    folder = edited(tmp_path, base_model_name_or_path="../base")
    shutil.copytree(FIXTURE / "base", tmp_path / "base")
    monkeypatch.chdir("/")
    assert peft.base(folder) == str(tmp_path / "base")
    (tmp_path / "link").symlink_to(folder)
    assert peft.base(tmp_path / "link" / ".") == str(tmp_path / "base")
    source = {"name": "lora", "checkpoint": str(folder)}
    assert network.based({"checkpoint": ""}, source) == {"checkpoint": str(tmp_path / "base")}
    for model in ({"checkpoint": "other"}, {"name": "transformer", "preset": "tiny"}):
        assert network.based(model, source) == model
    assert network.based({"checkpoint": ""}, "lora") == {"checkpoint": ""}
    for name in ("base", "meta-llama/Llama-3.1-8B", None):
        shutil.rmtree(folder)
        edited(tmp_path, base_model_name_or_path=name)
        with pytest.raises(
            UserError, match=rf"adapter_config\.json: base_model_name_or_path={name!r}: .*set config"
        ) as e:
            peft.base(folder)
        assert "\n" not in str(e.value)
