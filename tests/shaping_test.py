"""Rewards: length penalty in tokens, formats that only count if verified, tags, cosine curricula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import schedules
from jaxcl.rl import shaping
from jaxcl.schema import UserError


def test_overlong_penalty_is_linear_in_the_last_tokens():
    lengths = np.array([0, 12, 13, 14, 16, 20])
    got = shaping.overlong(lengths, limit=16, buffer=4, factor=2.0)
    np.testing.assert_allclose(got, [0, 0, -0.5, -1.0, -2.0, -4.0])
    np.testing.assert_allclose(shaping.overlong(jnp.asarray(lengths), limit=16, buffer=4, factor=2.0), got)
    with pytest.raises(UserError, match="buffer=17"):
        shaping.overlong(lengths, limit=16, buffer=17)
    with pytest.raises(UserError, match="numbers of tokens"):
        shaping.overlong(lengths * 1.0, limit=16, buffer=4)
    with pytest.raises(UserError, match="factor=-1"):
        shaping.overlong(lengths, limit=16, buffer=4, factor=-1)


def test_a_format_only_pays_for_verified_answers():
    verified, form = np.array([1.0, 1.0, 0.0, 0.0]), np.array([1.0, 0.0, 1.0, 0.5])
    np.testing.assert_allclose(shaping.formatted(verified, form, weight=0.1), [1.1, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(shaping.formatted(verified, form, weight=0.1, additive=True), [1.1, 1.0, 0.1, 0.05])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>4</answer>", 1.0),
        ("x <think></think> y <answer></answer> z", 1.0),
        ("<answer>4</answer><think>a</think>", 0.5),  # wrong order: only the first in place counts
        ("<think>a<answer>4</answer></think>", 0.5),  # nested
        ("<think>a</think><think>a</think><answer>4</answer>", 0.5),  # twice
        ("</think>a<think><answer>4</answer>", 0.5),
        ("<think>a</think>", 0.5),
        ("think answer", 0.0),
    ],
)
def test_tags_count_once_and_in_order(text, score):
    assert shaping.tags(text, ["think", "answer"]) == score


def test_cosine_goes_from_first_to_last_in_either_direction():
    mu = [float(shaping.cosine(s, first=0.9, last=0.05, steps=350)) for s in (0, 175, 350, 1000)]
    np.testing.assert_allclose(mu, [0.9, 0.475, 0.05, 0.05])
    wanted = schedules.cosine(peak=0.9, steps=350, end=0.05)
    steps = np.arange(0, 400, 7)
    np.testing.assert_allclose(shaping.cosine(steps, first=0.9, last=0.05, steps=350), [wanted(s) for s in steps])
    up = jax.jit(lambda s: shaping.cosine(s, first=0.0, last=1.0, steps=4))(jnp.int32(1))
    np.testing.assert_allclose(up, 0.5 * (1 - np.cos(np.pi / 4)), rtol=1e-6)


def test_curriculum_moves_from_the_first_reward_to_the_second():
    first, second = np.array([1.0, 0.0]), np.array([0.0, 2.0])
    options = {"w0": 1.0, "w1": 0.0, "steps": 10}
    np.testing.assert_allclose(shaping.curriculum(first, second, 0, **options), first)
    np.testing.assert_allclose(shaping.curriculum(first, second, 5, **options), [0.5, 1.0])
    np.testing.assert_allclose(shaping.curriculum(first, second, 10, **options), second)


def test_bad_options_are_named():
    with pytest.raises(UserError, match=r"first=1\.5"):
        shaping.cosine(0, first=1.5, last=0.0, steps=3)
    with pytest.raises(UserError, match="steps=0"):
        shaping.cosine(0, first=1.0, last=0.0, steps=0)
    with pytest.raises(UserError, match="at least one tag"):
        shaping.tags("", [])
