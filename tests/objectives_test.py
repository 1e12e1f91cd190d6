"""Objectives: a float64 transcription, gradients by enumeration, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl import grad
from jaxcl.rl import divergence, objectives
from jaxcl.schema import UserError
from jaxcl.types import Batch

B, L = 4, 6
NAMES = ("rloo", "remax", "reinforce", "reinforce_plus", "grpo", "dr_grpo", "dapo", "gspo", "cispo")
MEANS = ("sequence_token_mean", "token_mean", "fixed_length", "sequence_token_sum")


def make(name, **options):
    return objectives.make(name, **{"length": 9, **options})


def batch_of(columns):
    zero = jnp.zeros(columns["weights"].shape, jnp.int32)
    extra = {k: jnp.asarray(v) for k, v in columns.items() if k not in ("weights", "segments", "log_prob")}
    return Batch(zero, zero, jnp.asarray(columns["weights"]), jnp.asarray(columns["segments"]), zero, zero[:, 0], extra)


def columns_of(seed, packed=False, gap=0.3):
    """Returns random columns; packed rows hold two sequences, the others a prompt, drawn tokens and padding."""
    r = np.random.default_rng(seed)
    starts, ends = r.integers(0, 3, B), r.integers(3, L + 1, B)
    inside = (np.arange(L) >= starts[:, None]) & (np.arange(L) < ends[:, None])
    segments = np.where(np.arange(L) < 3, 1, 2) + np.zeros((B, 1), int) if packed else inside.astype(int)
    columns = {"weights": (inside & (r.uniform(size=(B, L)) < 0.8)) * r.choice([0.5, 1.0], (B, L), p=[0.1, 0.9])}
    columns |= {"segments": segments.astype(np.int32), "log_prob": -r.exponential(size=(B, L))}
    for name in ("old", "reference"):
        columns[name] = columns["log_prob"] + gap * r.standard_normal((B, L))
    columns["behaviour"] = columns["old"] + gap * r.standard_normal((B, L))
    if packed:
        choose = (np.arange(B)[:, None], segments - 1)
        columns["advantage"] = r.standard_normal((B, 2))[choose]
        columns["share"] = (r.uniform(size=(B, 2)) < 0.8).astype(float)[choose]
    else:
        columns["advantage"], columns["share"] = r.standard_normal(B), (r.uniform(size=B) < 0.8).astype(float)
    columns["dimensions"] = r.choice([1.0, 8.0], (B, L))
    columns["truncated"] = (r.uniform(size=B) < (0.0 if packed else 0.3)).astype(float)
    return columns


def value(name, columns, **options):
    """Returns (mean, gradient where tokens count)."""
    with jax.enable_x64(True):
        batch, surrogate = batch_of(columns), make(name, **options).surrogate
        lp = jnp.asarray(columns["log_prob"])
        total, weight = surrogate(lp, batch)
        slope = jax.grad(lambda x: surrogate(x, batch)[0])(lp) / weight
    return float(total / weight), np.asarray(slope)


# --- the transcription: one sequence, one token at a time


def bounded_exp(x):
    return np.exp(np.clip(x, -20, 20))


def token_cost(o, i, c, lp, fixed, members, entropy):
    """Returns the cost of token i; `fixed` are the log-probabilities of what is detached."""
    gap = {j: (lp[j] - c["old"][j]) / c["dimensions"][j] ** o["per_dimension"] for j in members}
    still = {j: (fixed[j] - c["old"][j]) / c["dimensions"][j] ** o["per_dimension"] for j in members}
    if o["sequence_ratio"]:
        length = sum(c["weights"][k] for k in members)
        shared = sum(c["weights"][k] * still[k] for k in members) / length
        rho, rho_still = bounded_exp(shared + gap[i] - still[i]), bounded_exp(shared)
    else:
        rho, rho_still = bounded_exp(gap[i]), bounded_exp(still[i])
    a = c["advantage"][i]
    low = -np.inf if o["clip_low"] is None else 1 - o["clip_low"]
    high = np.inf if o["clip_high"] is None else 1 + o["clip_high"]
    if o["gain"] == "score":
        gain = a * lp[i]
    elif o["gain"] == "detached":
        gain = min(max(rho_still, low), high) * a * lp[i]
    else:
        gain = min(rho * a, min(max(rho, low), high) * a)
        if o["dual_clip"] is not None and a < 0:
            gain = max(gain, o["dual_clip"] * a)
        gain *= c["dimensions"][i] ** o["per_dimension"] if o["rescale"] else 1
    k = lp[i] - c["reference"][i]
    k3 = bounded_exp(-k) + k - 1
    full = bounded_exp(lp[i] - c["old"][i])
    kl = {"rho_k1": full * k, "rho_k3": full * k3, "k2": k**2 / 2, "k3_forward": k3}[o["kl_loss"]]
    w = importance(o, i, c, members)
    return w * (o["kl"] * kl - gain) - o["entropy"] * entropy[i]


def importance(o, i, c, members):
    if o["correction"] == "none":
        return 1.0
    gap = {j: c["old"][j] - c["behaviour"][j] for j in members}
    if o["correction"].startswith("sequence"):
        w = bounded_exp(sum(gap.values()))
    elif o["correction"].startswith("geometric"):
        w = bounded_exp(sum(c["weights"][j] * gap[j] for j in members) / sum(c["weights"][j] for j in members))
    else:
        w = bounded_exp(gap[i])
    if o["correction"].endswith("_mask"):
        return w if w <= o["cap"] else 0.0
    return min(w, o["cap"])


def oracle(o, c, lp, fixed, entropy):
    """Returns (sum, weight)."""
    wide = {k: np.broadcast_to(v if v.ndim == 2 else v[:, None], (B, L)) for k, v in c.items()}
    total = weight = 0.0
    for b in range(B):
        groups = [range(L)] if o["sequences"] == 1 else [np.flatnonzero(c["segments"][b] == s) for s in (1, 2)]
        for group in groups:
            members = [(b, t) for t in group if wide["weights"][b, t] > 0]
            if not members:
                continue
            share = wide["share"][members[0]] * (1 - wide["truncated"][members[0]] * o["mask_truncated"])
            if not share:
                continue
            length = sum(wide["weights"][i] for i in members)
            cost = sum(wide["weights"][i] * token_cost(o, i, wide, lp, fixed, members, entropy) for i in members)
            total += share * cost / (length if o["mean"] == "sequence_token_mean" else 1)
            weight += share * {"token_mean": length, "fixed_length": o["length"]}.get(o["mean"], 1)
    return total, weight


def random_options(r):
    corrections = ["none", "token", "sequence", "geometric", "token_mask", "sequence_mask", "geometric_mask"]
    o = {
        "mean": r.choice(MEANS),
        "length": 9,
        "clip_low": r.choice([None, 0.1, 0.3]),
        "clip_high": r.choice([None, 0.1, 0.3]),
        "sequence_ratio": bool(r.integers(2)),
        "per_dimension": float(r.choice([0.0, 0.5, 1.0])),
        "rescale": bool(r.integers(2)),
        "correction": r.choice(corrections),
        "cap": float(r.choice([1.1, 2.0])),
        "kl": float(r.choice([0.0, 0.5])),
        "kl_loss": r.choice(divergence.LOSSES),
        "entropy": float(r.choice([0.0, 0.2])),
        "mask_truncated": bool(r.integers(2)),
    }
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in o.items()}


def test_two_hundred_random_cases_agree_with_the_transcription():
    for seed in range(25):  # options, with eight batches each
        r = np.random.default_rng(seed)
        name, packed = NAMES[seed % len(NAMES)], bool(r.integers(2))
        own = objectives._own(name)
        options = {k: v for k, v in random_options(r).items() if k in ("length", "kl_loss") or r.uniform() < 0.5}
        options["sequences"] = 1 + packed
        if own.get("gain") is None and r.uniform() < 0.5:
            options["dual_clip"] = 1.2
        o = {**objectives.Options._field_defaults, **own, **options}
        cases = [columns_of(8 * seed + i, packed) for i in range(8)]
        entropy, direction = r.exponential(size=(8, B, L)), r.standard_normal((8, B, L))
        with jax.enable_x64(True):
            batches = jax.tree.map(lambda *x: jnp.stack(x), *map(batch_of, cases))
            lps = jnp.asarray([c["log_prob"] for c in cases])
            loss = jax.value_and_grad(objectives.make(name, **options).surrogate, has_aux=True)
            (totals, weights), slopes = jax.tree.map(np.asarray, jax.vmap(loss)(lps, batches, jnp.asarray(entropy)))
        for i, c in enumerate(cases):
            lp, close = c["log_prob"], functools.partial(np.testing.assert_allclose, rtol=1e-6, err_msg=str(o))
            close((totals[i], weights[i]), oracle(o, c, lp, lp, entropy[i]), atol=1e-9)
            ends = [oracle(o, c, lp + s * 1e-6 * direction[i], lp, entropy[i])[0] for s in (1, -1)]
            close(np.sum(slopes[i] * direction[i]), (ends[0] - ends[1]) / 2e-6, atol=1e-7)


def test_the_names_are_what_the_papers_say():
    """Each name by its own formula, with defaults, on one batch of three sequences."""
    lp, old = np.log([[0.5, 0.4], [0.2, 0.6], [0.3, 0.9]]), np.log([[0.25, 0.4], [0.3, 0.3], [0.3, 0.9]])
    a, w = np.array([1.0, -2.0, 0.5]), np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    rho, each = np.exp(lp - old), np.array([2.0, 2.0, 1.0])

    def clipped(low, high, rho=rho):
        return np.minimum(rho * a[:, None], np.clip(rho, 1 - low, 1 + high) * a[:, None])

    s = np.exp((w * (lp - old)).sum(1) / each)[:, None] * np.ones((1, 2))
    score = -(w * a[:, None] * lp).sum() / 3
    wanted = {
        "rloo": score,
        "remax": score,
        "reinforce": score,
        "reinforce_plus": -(w * clipped(0.2, 0.2)).sum() / 5,
        "grpo": -((w * clipped(0.2, 0.2)).sum(1) / each).mean(),
        "dr_grpo": -(w * clipped(0.2, 0.2)).sum() / (3 * 9),
        "dapo": -(w * clipped(0.2, 0.28)).sum() / 5,
        "gspo": -((w * clipped(3e-4, 4e-4, s)).sum(1) / each).mean(),
        "cispo": -(w * np.minimum(rho, 5) * a[:, None] * lp).sum() / 5,
    }
    columns = {"weights": w, "segments": w.astype(np.int32), "log_prob": lp, "behaviour": old}
    columns = {k: np.pad(v, ((0, B - 3), (0, L - 2))) for k, v in columns.items()}
    columns |= {"advantage": np.pad(a, (0, B - 3)), "share": np.ones(B)}
    for name in NAMES:
        assert value(name, columns)[0] == pytest.approx(wanted[name], rel=1e-9), name


# --- gradients by enumeration


def enumerate_kl(name, policy, reference, drawn):
    """Returns the exact expected gradient of the loss `name` over tokens drawn from `drawn`; logits [V]."""
    size = len(policy)
    columns = {"weights": jnp.ones((size, 1)), "segments": jnp.ones((size, 1), jnp.int32), "advantage": jnp.zeros(size)}
    columns |= {"share": jnp.exp(drawn), "old": drawn[:, None], "behaviour": drawn[:, None]}
    columns["reference"] = reference[:, None]

    def loss(logits):
        return make("rloo", kl=0.7, kl_loss=name).surrogate(jax.nn.log_softmax(logits)[:, None], batch_of(columns))[0]

    return jax.grad(loss)(policy) / 0.7


def test_gradients_of_divergence_losses_by_enumeration():
    r = np.random.default_rng(0)
    with jax.enable_x64(True):
        policy, q, mu = (jnp.asarray(r.standard_normal(5)) for _ in range(3))
        q, mu = jax.nn.log_softmax(q), jax.nn.log_softmax(mu)
        p = jax.nn.log_softmax(policy)

        def divergence_from(first, second):
            return jnp.sum(jnp.exp(first) * (first - second))

        reverse = jax.grad(lambda z: divergence_from(jax.nn.log_softmax(z), q))(policy)
        forward = jax.grad(lambda z: divergence_from(q, jax.nn.log_softmax(z)))(policy)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-10)

        @jax.jit
        def gradients(drawn):
            return {name: enumerate_kl(name, policy, q, drawn) for name in divergence.LOSSES}

        own, foreign = gradients(p), gradients(mu)
        for name in ("rho_k3", "rho_k1", "k2"):
            close(own[name], reverse, err_msg=name)
        close(own["k3_forward"], forward)
        for name in ("rho_k3", "rho_k1"):  # the ratio makes them right on another policy's samples
            close(foreign[name], reverse, err_msg=name)
        assert np.abs(foreign["k2"] - reverse).max() > 0.01

        def k1(z):
            return jnp.sum(jnp.exp(p) * divergence.estimators(jax.nn.log_softmax(z), q)["k1"])

        close(jax.grad(k1)(policy), np.zeros(5), atol=1e-12)
        assert np.abs(reverse - forward).max() > 0.01
        values = {k: jnp.sum(jnp.exp(p) * v) for k, v in divergence.estimators(p, q).items()}
        close(values["k1"], divergence_from(p, q))
        close(values["k3"], divergence_from(p, q))


def test_the_default_divergence_is_the_reverse_and_bare_estimators_are_refused():
    assert objectives.Options._field_defaults["kl_loss"] == "rho_k3"
    with pytest.raises(UserError, match="kl_loss='k1': its expected gradient is 0; use 'rho_k1'"):
        make("grpo", kl=0.1, kl_loss="k1")
    with pytest.raises(UserError, match=r"kl_loss='k3'.*forward.*'rho_k3'"):
        make("grpo", kl=0.1, kl_loss="k3")
    with pytest.raises(UserError, match="did you mean 'k3_forward'"):
        make("grpo", kl_loss="k3_forwards")


def rollout_gradient(logits, sampler, reward, length=2, **options):
    """Returns the expected RLOO gradient over all pairs of tokens, drawn from `sampler`; logits [1 + V, V].

    With a length of 1 the second token is not part of the objective.
    """
    size = logits.shape[1]
    first, second = (x.ravel() for x in jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"))

    def log_prob(z):
        table = jax.nn.log_softmax(z)
        return jnp.stack([table[0, first], table[1 + first, second]], axis=1)

    behaviour, weights = log_prob(sampler), jnp.ones((size**2, 2)).at[:, length:].set(0.0)
    columns = {"weights": weights, "segments": jnp.ones((size**2, 2), jnp.int32), "advantage": reward}
    columns |= {"share": jnp.exp(behaviour.sum(1)), "behaviour": behaviour, "old": log_prob(logits)}
    surrogate = make("rloo", **options).surrogate
    return jax.grad(lambda z: surrogate(log_prob(z), batch_of(columns))[0])(logits)


@pytest.mark.parametrize(("correction", "length"), [("token", 1), ("sequence", 2), ("sequence_mask", 2)])
def test_truncated_importance_sampling_removes_the_bias_of_a_noisy_sampler(correction, length):
    plain_gradient = jax.jit(functools.partial(rollout_gradient, length=length))
    corrected_gradient = jax.jit(functools.partial(rollout_gradient, length=length, correction=correction))
    for seed in range(5):
        r = np.random.default_rng(seed)
        reward = np.repeat(r.standard_normal(5), 5) if length == 1 else r.standard_normal(25)
        with jax.enable_x64(True):
            logits, reward = jnp.asarray(r.standard_normal((6, 5))), jnp.asarray(reward)
            sampler = logits + 0.05 * jnp.asarray(r.standard_normal((6, 5)))
            raw, better = plain_gradient(logits, sampler, reward), corrected_gradient(logits, sampler, reward)
            found = [np.asarray(x) for x in (plain_gradient(logits, logits, reward), raw, better)]
        plain, corrected = (np.linalg.norm(x - found[0]) for x in found[1:])
        assert plain > 1e-3
        assert corrected < plain / 3
        assert corrected < 1e-9  # no weight reaches the cap


def test_token_correction_of_one_token_and_of_the_current_policy():
    with jax.enable_x64(True):
        c = columns_of(0)
        surrogate = make("rloo", correction="token", proximal="current").surrogate
        slope = jax.grad(lambda x: surrogate(x, batch_of(c))[0])(jnp.asarray(c["log_prob"]))
    weight = np.minimum(np.exp(c["log_prob"] - c["behaviour"]), 2.0)
    wanted = -(c["weights"] * c["share"][:, None] * c["advantage"][:, None] * weight)
    np.testing.assert_allclose(slope, wanted, rtol=1e-6, atol=1e-9)


# --- what must not change an objective


def dirty(columns):
    """Returns the columns with NaN wherever nothing counts."""
    dead = columns["weights"] == 0
    names = ("log_prob", "old", "behaviour", "reference", "dimensions")
    return columns | {k: np.where(dead, np.nan, columns[k]) for k in names}


ALL = {"kl": 0.3, "correction": "token", "per_dimension": 0.5}


@pytest.mark.parametrize("name", NAMES)
def test_forced_tokens_and_padding_change_neither_loss_nor_gradient(name):
    columns = columns_of(3)
    mean, slope = value(name, columns, **ALL)
    assert mean
    assert (slope[columns["weights"] == 0] == 0).all()
    again, slope_again = value(name, dirty(columns), **ALL)
    assert again == mean
    np.testing.assert_array_equal(slope_again, slope)


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_and_packing_change_nothing(name):
    columns = columns_of(3)
    columns["weights"][:, 3:], columns["segments"][:, 3:] = 0, 0
    mean, slope = value(name, columns, **ALL)
    rolled = {k: np.roll(v, 2, axis=1) if v.ndim == 2 else v for k, v in columns.items()}
    padded, slope_padded = value(name, rolled, **ALL)
    np.testing.assert_allclose(padded, mean, rtol=1e-12)
    np.testing.assert_allclose(np.roll(slope_padded, -2, axis=1), slope, rtol=1e-12)
    full = {k: v if v.ndim == 2 else np.repeat(v[:, None], L, 1) for k, v in columns.items()}
    packed = {k: np.concatenate([v[:2, :3], v[2:, :3]], axis=1) for k, v in full.items()}
    packed["segments"] = np.repeat([[1] * 3 + [2] * 3], 2, 0).astype(np.int32)
    packed = {k: np.concatenate([v, 0 * v]) for k, v in packed.items()}  # and two rows of padding
    both, slope_both = value(name, packed, sequences=2, **ALL)
    np.testing.assert_allclose(both, mean, rtol=1e-12)
    np.testing.assert_allclose(np.concatenate([slope_both[:2, :3], slope_both[:2, 3:]]), slope[:, :3], rtol=1e-12)
    assert np.isnan(value(name, packed, **ALL)[0])  # a row that holds more than it has room for


@pytest.mark.parametrize("name", NAMES)
def test_sums_and_weights_of_rows_add_up_to_those_of_the_batch(name):
    columns = columns_of(5)
    whole, slope = value(name, columns, kl=0.3)
    with jax.enable_x64(True):
        surrogate, rows = make(name, kl=0.3).surrogate, []
        for i in range(B):  # row i and padding
            row = {k: np.where((np.arange(B) == i).reshape([B] + [1] * (v.ndim - 1)), v, 0) for k, v in columns.items()}
            lp = jnp.asarray(row["log_prob"])
            rows.append(jax.value_and_grad(surrogate, has_aux=True)(lp, batch_of(row)))
    weight = sum(float(w) for (_, w), _ in rows)
    np.testing.assert_allclose(sum(float(total) for (total, _), _ in rows) / weight, whole, rtol=1e-9)
    np.testing.assert_allclose(sum(np.asarray(g) for _, g in rows) / weight, slope, rtol=1e-9)


def test_microbatches_do_not_change_the_objective():
    columns, r = columns_of(5), np.random.default_rng(0)
    features, objective = jnp.asarray(r.standard_normal((B, L, 3)), jnp.float32), make("dapo", kl=0.3)
    columns = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in columns.items()}
    batch = batch_of(columns | {"features": features, "base": columns["log_prob"]})

    def losses(params, rows):
        log_prob = rows.extra["base"] + rows.extra["features"] @ params
        return {
            "policy": objective.surrogate(log_prob, rows),
            "clipped": objective.measures(log_prob, rows)["clip_fraction"],
        }

    params, found = jnp.asarray([0.1, -0.2, 0.05]), {}
    for count in (1, 2, 4):
        values, gradient = jax.jit(grad.value_and_grad, static_argnums=(0, 3))(losses, params, batch, count)
        found[count] = gradient, {k: s / w for k, (s, w) in values.items()}
    for count in (2, 4):
        np.testing.assert_allclose(found[count][0], found[1][0], rtol=1e-6, atol=1e-6)
        for key, mean in found[1][1].items():
            np.testing.assert_allclose(found[count][1][key], mean, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("options", [{}, {"per_dimension": 0.5}])
def test_on_policy_all_objectives_have_the_policy_gradient(options):
    columns = columns_of(7)
    columns |= {"old": columns["log_prob"], "behaviour": columns["log_prob"]}
    live = columns["weights"] * columns["share"][:, None]
    wanted = -live * columns["advantage"][:, None] / live.sum()
    for name in NAMES:
        slope = value(name, columns, mean="token_mean", **options)[1]
        np.testing.assert_allclose(slope, wanted, rtol=1e-9, err_msg=name)
        with jax.enable_x64(True):
            o, lp, batch = make(name, **options), jnp.asarray(columns["log_prob"]), batch_of(columns)
            metrics = {k: float(v) for k, v in o.metrics(lp, batch).items()}
            pull = jax.grad(lambda x, o=o, b=batch: sum(total for total, _ in o.measures(x, b).values()))(lp)
        assert not pull.any()  # measures may stand among the losses
        assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
        assert metrics["clip_fraction"] == metrics["mismatch_k3"] == 0


def test_without_rescaling_dimensions_divide_the_gradient():
    columns = columns_of(7)
    columns |= {"old": columns["log_prob"], "behaviour": columns["log_prob"]}
    whole = value("grpo", columns)[1]
    part = value("grpo", columns, per_dimension=1.0, rescale=False)[1]
    np.testing.assert_allclose(part, whole / columns["dimensions"], rtol=1e-9)


def test_dr_grpo_is_grpo_with_another_mean_and_no_scale():
    columns = columns_of(1)
    other = value("grpo", columns, mean="fixed_length", scale="none")
    for got, wanted in zip(value("dr_grpo", columns), other, strict=True):
        np.testing.assert_array_equal(got, wanted)
    rewards = np.array([[0.0, 0.0, 2.0, 2.0]])
    grpo, dr_grpo = (make(n, ddof=0, epsilon=0.0).advantages(rewards).values for n in ("grpo", "dr_grpo"))
    np.testing.assert_allclose(grpo, dr_grpo)  # its population std is 1


def test_truncated_rows_are_masked_and_extreme_ratios_stay_finite():
    columns = columns_of(2) | {"truncated": np.array([1.0, 0.0, 0.0, 1.0]), "share": np.ones(B)}
    kept = columns | {"share": np.array([0.0, 1.0, 1.0, 0.0])}
    assert value("dapo", columns, mask_truncated=True)[0] == pytest.approx(value("dapo", kept)[0], rel=1e-12)
    columns["log_prob"] = columns["old"] + 5000.0
    mean, slope = value("grpo", columns, kl=0.1, clip_high=None)
    assert np.isfinite(mean)
    assert np.isfinite(slope).all()
    empty = columns | {"share": np.zeros(B)}
    with jax.enable_x64(True):
        pair = make("grpo").surrogate(jnp.asarray(columns["log_prob"]), batch_of(empty))
    assert [float(x) for x in pair] == [0, 0]


def test_metrics_agree_with_numpy():
    columns = columns_of(4) | {"share": np.ones(B)}
    live = columns["weights"] > 0
    w = columns["weights"][live]
    lp, old, behaviour, ref = (columns[k][live] for k in ("log_prob", "old", "behaviour", "reference"))
    a, rho, k = np.repeat(columns["advantage"][:, None], L, 1)[live], np.exp(lp - old), lp - ref
    gap = old - behaviour
    wanted = {
        "ratio_mean": np.average(rho, weights=w),
        "ratio_max": rho.max(),
        "clip_fraction": np.average(((rho < 0.8) & (a < 0)) | ((rho > 1.2) & (a > 0)), weights=w),
        "entropy": -np.average(lp, weights=w),
        "k1": np.average(k, weights=w),
        "k2": np.average(k**2 / 2, weights=w),
        "k3": np.average(np.exp(-k) + k - 1, weights=w),
        "mismatch_k3": np.average(np.exp(gap) - gap - 1, weights=w),
        "mismatch_gap": np.average(np.abs(gap), weights=w),
        "mismatch_max": np.exp(gap).max(),
        "mismatch_capped": np.average(np.exp(gap) > 1.1, weights=w),
    }
    with jax.enable_x64(True):
        got = make("grpo", cap=1.1).metrics(jnp.asarray(columns["log_prob"]), batch_of(columns))
    assert set(got) == set(wanted)
    assert 0 < wanted["clip_fraction"] < 1
    for key, x in wanted.items():
        np.testing.assert_allclose(got[key], x, rtol=1e-6, err_msg=key)
        assert got[key].dtype == jnp.float32
    with jax.enable_x64(True):
        lp, batch = jnp.asarray(columns["log_prob"]), batch_of(columns)
        assert float(make("grpo").metrics(lp, batch, jnp.full((B, L), 2.5))["entropy"]) == 2.5
        assert float(make("rloo").metrics(lp, batch)["clip_fraction"]) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grop", {}, "name='grop': no such objective; did you mean 'grpo'"),
        ("grpo", {"clip_hi": 0.2}, "clip_hi: unknown key; did you mean 'clip_high'"),
        ("grpo", {"mean": "mean"}, "mean='mean': expected"),
        ("dr_grpo", {}, "length=None: dr_grpo needs the longest completion"),
        ("grpo", {"clip_low": 1.5}, "clip_low=1.5: must lie in"),
        ("grpo", {"clip_high": -0.1}, "clip_high=-0.1: must not be negative"),
        ("grpo", {"dual_clip": 1.0}, "dual_clip=1.0: must be above 1"),
        ("rloo", {"dual_clip": 3.0}, "dual_clip=3.0: needs gain='ratio'"),
        ("grpo", {"cap": 0.0}, "cap=0.0: must be above 0"),
        ("grpo", {"kl": -1.0}, "kl=-1.0: must not be negative"),
        ("grpo", {"sequences": 0}, "sequences=0: must be 1 or more"),
        ("grpo", {"per_dimension": -1.0}, "per_dimension=-1.0: must not be negative"),
        ("grpo", {"entropy": -1.0}, "entropy=-1.0: must not be negative"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        objectives.make(name, **options)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, "share"),
        ({}, "advantage"),
        ({}, "behaviour"),
        ({"kl": 0.1}, "reference"),
        ({"correction": "token"}, "old"),
        ({"correction": "token", "proximal": "current"}, "behaviour"),
        ({"per_dimension": 0.5}, "dimensions"),
        ({"mask_truncated": True}, "truncated"),
    ],
)
def test_missing_columns_are_named(options, missing):
    columns = columns_of(0)
    names = {missing, "old"} if missing == "behaviour" and not options else {missing}
    batch = batch_of({k: v for k, v in columns.items() if k not in names})
    with pytest.raises(UserError, match=f"column '{missing}' is missing"):
        make("grpo", **options).surrogate(jnp.asarray(columns["log_prob"]), batch)


def test_shapes_and_entropy_are_checked():
    columns = columns_of(0)
    with pytest.raises(UserError, match=r"log_prob of shape \[4, 5\]: expected \[4, 6\]"):
        make("grpo").surrogate(jnp.asarray(columns["log_prob"][:, 1:]), batch_of(columns))
    with pytest.raises(UserError, match=r"entropy=0\.1: the surrogate was given no entropy"):
        make("grpo", entropy=0.1).surrogate(jnp.asarray(columns["log_prob"]), batch_of(columns))
