"""Vocabulary kernels with narrow targets, next to no temperature, shapes that do not fit, and in a mesh that is cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxcl.kernels import vocabulary

DRAW = np.random.default_rng(0)
HIDDEN = DRAW.standard_normal((5, 6)).astype(np.float32)
HEAD = DRAW.standard_normal((6, 300)).astype(np.float32)


@pytest.mark.parametrize("chunk", [None, 128, 290])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint32"])
def test_targets_of_any_width_count_their_column_once(kind, chunk):
    targets = np.array([3, 44, 127, 0, 99])
    want = jax.nn.log_softmax(HIDDEN @ HEAD)[np.arange(5), targets]
    found, _ = vocabulary.cross_entropy(HIDDEN, HEAD, jnp.asarray(targets, kind), chunk=chunk)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("temperature", [1e-4, 1e-9, 1e-12])
def test_next_to_no_temperature_gives_the_likeliest_row_and_finite_gradients(temperature, chunk):
    hidden = np.random.default_rng(1).standard_normal((50, 16)).astype(np.float32)
    head = np.random.default_rng(2).standard_normal((16, 200)).astype(np.float32)

    @jax.jit
    def run(hidden, head):
        out, pull = jax.vjp(
            lambda h, w: vocabulary.mixture(h, w, jnp.eye(200), temperature=temperature, chunk=chunk)[0], hidden, head
        )
        return out, pull(jnp.ones_like(out))

    mean, slopes = run(hidden, head)
    np.testing.assert_allclose(mean, np.eye(200)[np.argmax(hidden @ head, axis=-1)], atol=2e-2)
    assert all(np.all(np.isfinite(x)) for x in slopes)


PAIR = (HIDDEN, HEAD)
BAD = {
    r"temperature of shape \(1,\): expected one number": lambda: mix(temperature=jnp.ones(1)),
    r"temperature=-1\.0: expected a positive": lambda: mix(temperature=np.float32(-1)),
    r"temperature=0\.0: expected a positive": lambda: mix(temperature=jnp.float32(0)),
    "temperature=nan": lambda: mix(temperature=math.nan),
    r"head \[6, 0\]: expected at least one column": lambda: vocabulary.cross_entropy(
        HIDDEN, HEAD[:, :0], np.zeros(5, int)
    ),
    "the same vocabulary": lambda: vocabulary.kl(10, 1.0, (HIDDEN, HEAD[:, :60]), PAIR),
    "expected the same tokens": lambda: vocabulary.kl(10, 1.0, PAIR, (HIDDEN[:1], HEAD)),
    "width=0, scale=1.0: expected 1 to 300": lambda: vocabulary.kl(0, 1.0, PAIR, PAIR),
    "width=301": lambda: vocabulary.kl(301, 1.0, PAIR, PAIR),
    "scale=nan": lambda: vocabulary.kl(10, math.nan, PAIR, PAIR),
}


def mix(**options):
    return vocabulary.mixture(HIDDEN, HEAD, HEAD.T, **options)


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_a_mesh_that_is_cut_already_needs_one_option_and_the_error_names_it():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    hidden, spec = np.tile(HIDDEN[:1], (4, 1)), PartitionSpec("d")
    mean = functools.partial(vocabulary.mixture, embedding=HEAD.T, temperature=1.0, chunk=64)
    cut = {"mesh": mesh, "in_specs": (spec, PartitionSpec()), "out_specs": (spec, spec)}
    found = jax.jit(jax.shard_map(mean, check_vma=False, **cut))(hidden, HEAD)
    np.testing.assert_allclose(found[0], mean(hidden, HEAD)[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"mixture inside jax\.shard_map over d: give it check_vma=False"):
        jax.jit(jax.shard_map(mean, **cut))(hidden, HEAD)
