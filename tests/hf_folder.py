"""A checkpoint folder as a model, and as the weights of a run that the export command can write, without training."""

import jax

from jaxcl import weights
from jaxcl.data import tokenizer
from jaxcl.hf import read
from jaxcl.models import transformer
from jaxcl.models.config import resolve
from jaxcl.network import Network


def load(folder):
    """Returns shape, model and float32 parameters."""
    config = resolve(read.fields(folder) | {"vocab_multiple": 16})
    model = transformer.from_config(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return config, model, read.load(folder, config, shapes)


def weights_of(folder, config, model, params, adapter=None):
    """Returns what `weights.load` would of a run that began at `folder` (None: from nothing), with plain bytes."""
    about = {"id": "none", "facts": {"sources": {}}, "versions": {}, "config": {"tokenizer": {"name": "byte"}}}
    network = Network(model, None, config, folder and str(folder), adapter)
    return weights.Weights(network, params, tokenizer.make(), 7, about, {})
