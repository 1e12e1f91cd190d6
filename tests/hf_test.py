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

from jaxcl import mesh as meshes
from jaxcl.hf import axes, families, files, read, write
from jaxcl.models import transformer
from jaxcl.models.config import resolve
from jaxcl.schema import UserError
from jaxcl.types import Batch

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
    assert logits.shape[-1] == config.vocab == 73
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert np.std(expected["logits"]) > 0.5
