"""Side by side with transformers and PEFT, where they are installed: the same numbers from the same files, both ways.

    pip install -e '.[hf]' torch peft pytest pytest-timeout hypothesis && python -m pytest tests/hf_live_test.py

The default suite rests on recorded fixtures instead; the models here are other draws than those.
"""

import importlib.util
import itertools
import warnings
from pathlib import Path

import hf_folder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxcl import generate
from jaxcl.hf import __main__ as command
from jaxcl.hf import families, files, peft
from jaxcl.models import lora
from jaxcl.network import Adapter
from jaxcl.types import Batch

WHY = "needs pip install -e '.[hf]' torch peft"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these packages say while they are loaded is theirs
    torch = pytest.importorskip("torch", reason=WHY, exc_type=ImportError)
    transformers = pytest.importorskip("transformers", reason=WHY, exc_type=ImportError)
    library = pytest.importorskip("peft", reason=WHY, exc_type=ImportError)

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("hf_models", ROOT / "experiments" / "fixtures" / "hf_models.py")
assert spec
assert spec.loader
recipe = importlib.util.module_from_spec(spec)  # of the recorded fixtures: its cases, and how it draws a model
spec.loader.exec_module(recipe)

THEIRS = "(torch|transformers|peft|accelerate|huggingface_hub)"  # warnings out of ours stay errors
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}:{THEIRS}")
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True, scope="module")
def alone():
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def saved(name, folder):
    """Writes a model of a case as transformers does; returns it as transformers loads it, and what it computes."""
    kind, fields = recipe.CASES[name]
    for seed in itertools.count(1000):  # the recorded ones come before
        model = recipe.build(kind, fields, seed)
        narrow = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
        for weight in model.parameters():
            weight.data = weight.data.to(narrow).float()
        if (arrays := recipe.expect(model, seed)) is not None:  # no ties, no monotony
            break
    model = model.to(narrow)
    model.save_pretrained(folder, max_shard_size="10KB" if name.endswith("sharded") else "1GB")
    return loaded(folder), {key: value.numpy() for key, value in arrays.items()}


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def rows(tokens):
    zeros = np.zeros(tokens.shape, np.int32)
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens.astype(np.int32), zeros, np.ones(tokens.shape, np.float32), zeros + 1, place, zeros[:, 0])


def logits_of(model, tokens):
    with torch.no_grad():
        row = torch.from_numpy(tokens)
        return model(row, attention_mask=torch.ones_like(row)).logits.numpy()


def our_logits(model, params, tokens):
    return np.asarray(
        toys.quick(lambda p, b: model.apply(p, b).logits)(params, jax.tree.map(jnp.asarray, rows(tokens)))
    )


def greedy_of(model, prompt):
    """Returns what `generate` of transformers makes of a prompt."""
    row = torch.from_numpy(prompt)
    model.generation_config.eos_token_id = None  # on to the end
    whole = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=recipe.NEW, do_sample=False)
    return whole.numpy()[:, prompt.shape[1] :]


def our_greedy(model, params, prompt):
    run = toys.quick(lambda p, t: generate.greedy(model, p, t, jnp.ones_like(t), recipe.NEW, jnp.array([-1])))
    return np.asarray(run(params, jnp.asarray(prompt, jnp.int32)))


def as_run(monkeypatch, *pieces):
    """Lets the export command find these weights where it looks for those of a run."""
    found = hf_folder.weights_of(*pieces)
    monkeypatch.setattr(command.weights, "load", lambda run, step=None: found)


@pytest.mark.parametrize("name", sorted(recipe.CASES))
def test_a_model_of_transformers_comes_and_goes_unchanged(name, tmp_path, monkeypatch):
    """Logits to 1e-4 and greedy continuations, of what they wrote here, and of what is exported there."""
    theirs, wanted = saved(name, tmp_path / "theirs")
    config, model, params = hf_folder.load(tmp_path / "theirs")
    tokens, prompt = wanted["tokens"], wanted["prompt"]
    assert np.std(wanted["logits"]) > 0.5
    np.testing.assert_allclose(our_logits(model, params, tokens), wanted["logits"], atol=1e-4)
    np.testing.assert_array_equal(our_greedy(model, params, prompt), wanted["greedy"])
    np.testing.assert_array_equal(greedy_of(theirs, prompt), wanted["greedy"])
    # With their config.json, and with one that is made from our fields alone.
    for place, origin in (("out", tmp_path / "theirs"), ("new", None)):
        as_run(monkeypatch, origin, config, model, params)
        command.main(["export", str(tmp_path / "run"), str(tmp_path / place), *(["--dtype=float32"] * (not origin))])
        again = loaded(tmp_path / place)
        np.testing.assert_array_equal(logits_of(again, tokens), logits_of(theirs, tokens))
        np.testing.assert_array_equal(greedy_of(again, prompt), wanted["greedy"])
    kept = files.open_folder(tmp_path / "out")
    assert kept.dtype("model.norm.weight") == files.open_folder(tmp_path / "theirs").dtype("model.norm.weight")


def test_all_families_are_among_the_cases():
    assert {kind for kind, _ in recipe.CASES.values()} == set(families.FAMILIES)


@pytest.mark.parametrize("name", ["llama3", "qwen2_window", "qwen3"])
def test_trained_weights_are_those_that_transformers_loads(name, tmp_path, monkeypatch):
    """Not what was imported but other values of every parameter."""
    _, drawn = saved(name, tmp_path / "theirs")
    config, model, params = hf_folder.load(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), params)
    as_run(monkeypatch, tmp_path / "theirs", config, model, moved)
    command.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    again, tokens = loaded(tmp_path / "out"), drawn["tokens"]
    wanted = logits_of(again, tokens)
    np.testing.assert_allclose(our_logits(model, moved, tokens), wanted, atol=1e-4)
    assert np.abs(our_logits(model, params, tokens) - wanted).max() > 0.1
    np.testing.assert_array_equal(our_greedy(model, moved, drawn["prompt"]), greedy_of(again, drawn["prompt"]))


@pytest.mark.parametrize("name", ["llama_bias", "mistral", "qwen2", "qwen3_tied"])
def test_adapters_of_peft_come_and_go(name, tmp_path, monkeypatch):
    base, drawn = saved(name, tmp_path / "theirs")
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    wrapped = library.get_peft_model(base, library.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    for path, value in wrapped.named_parameters():
        if "lora_" in path:
            torch.nn.init.normal_(value, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    config, plain, params = hf_folder.load(tmp_path / "theirs")
    tokens = drawn["tokens"]
    wanted = logits_of(wrapped, tokens)

    found = peft.options(tmp_path / "adapter")
    model = lora.make(plain, **found)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    held = {"base": params, "lora": peft.load(tmp_path / "adapter", shapes["lora"])}
    np.testing.assert_allclose(our_logits(model, held, tokens), wanted, atol=1e-4)
    assert np.abs(our_logits(plain, params, tokens) - wanted).max() > 0.1
    assert peft.base(tmp_path / "adapter") == str(tmp_path / "theirs")

    as_run(monkeypatch, tmp_path / "theirs", config, model, held, Adapter(**found))
    command.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    fresh = loaded(tmp_path / "theirs")
    again = library.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    np.testing.assert_allclose(logits_of(again, tokens), wanted, atol=1e-6)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("µ")["input_ids"] == list("µ".encode())
    command.main(["export", str(tmp_path / "run"), str(tmp_path / "merged")])
    np.testing.assert_allclose(logits_of(loaded(tmp_path / "merged"), tokens), wanted, atol=1e-4)
