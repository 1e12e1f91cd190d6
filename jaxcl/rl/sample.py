"""Rollouts: groups of completions of a prompt, thoughts first and then an answer, as one compiled program.

Each row walks through three phases. In THOUGHT a policy draws what is fed back, an embedding or a token; it ends after
`thoughts` steps or when the shadow (the tokens drawn, or the likeliest ones) ends with a stop phrase. In FORCED
given tokens are fed. In ANSWER tokens are drawn as usual until one ends the row or there are `answer` of them.

Prompts are computed once and shared by their group. The program has a fixed number of slots, and a slot whose row has
ended takes the next request, so that long rows do not hold up short ones. All slots write to the same place of a ring
of P + T; segments and positions say what a row sees. The key of every draw is that of its request and step,
so that no result depends on the slots or on the other rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.kernels import vocabulary
from jaxcl.random import categorical
from jaxcl.rl import thoughts
from jaxcl.rl.thoughts import Policy, Record
from jaxcl.types import Batch, Key, Model, Output, Params

NOTHING, THOUGHT, FORCED, ANSWER = range(4)  # kinds of what was drawn; NOTHING is after the end
Slots = dict[str, jax.Array]  # of every slot, [W, ...]


class Limits(NamedTuple):
    """How long the phases are, and what ends them."""

    thoughts: int  # most steps of THOUGHT
    answer: int  # most tokens of ANSWER
    stop: tuple[tuple[int, ...], ...] = ()  # phrases that end THOUGHT, in tokens; all ways to write the same text
    forced: tuple[int, ...] = ()  # fed after a stop phrase
    late: tuple[int, ...] = ()  # fed if THOUGHT has come to its end without a stop phrase
    end: tuple[int, ...] = ()  # tokens that end ANSWER

    @property
    def total(self) -> int:
        """T, most steps of a row."""
        return self.thoughts + max(len(self.forced), len(self.late)) + self.answer


class Rollouts(NamedTuple):
    """R = prompts x group rows, row r of prompt r // group; arrays [R, T, ...] are zero where kind is NOTHING."""

    kind: jax.Array  # int8: THOUGHT, FORCED, ANSWER
    token: jax.Array  # int32: drawn or forced; of a soft thought the likeliest one
    log_prob: jax.Array  # float32: of what was drawn, in nats; 0 where it was forced or greedy
    record: Record  # of the policy, where kind is THOUGHT
    stopped: jax.Array  # bool [R]: whether a stop phrase (if there are some) ended the thoughts
    ended: jax.Array  # bool [R]: whether an end token (if there are some) ended the answer
    steps: jax.Array  # int32 []: of the loop; the slots were busy for sum(kind != NOTHING) / (steps W)


def sample(
    model: Model,
    params: Params,
    prompts: jax.Array,
    segments: jax.Array,
    key: Key,
    *,
    policy: Policy,
    limits: Limits,
    group: int = 1,
    slots: int | None = None,
    greedy: bool = False,
    greedy_answer: bool = False,
    temperature: float = 1.0,
) -> Rollouts:
    """Draws `group` completions of every prompt. Pure: jit it with all but the arrays fixed.

    Args:
      model: takes `cache`, `extra["soft"]` and `extra[policy.column]`, and gives `embedding`, as the transformer does.
      params: its parameters.
      prompts: int32 [N, P], padded on the left.
      segments: int32 [N, P]: 0 = padding, 1 = prompt.
      key: of all draws.
      policy: of the thoughts.
      limits: see `Limits`.
      group: G, completions of a prompt.
      slots: W, rows that are computed at a time; None = all R.
      greedy: whether thoughts are `policy.greedy` instead of drawn.
      greedy_answer: whether answers are the likeliest tokens.
      temperature: of the answers that are drawn.
    """
    first = _prefill(model, params, prompts, segments)
    lengths = jnp.sum(segments > 0, axis=1)  # [N]
    size = _Size(
        len(prompts) * group, group, min(slots or len(prompts) * group, len(prompts) * group), prompts.shape[1]
    )
    draw = _drawing(policy, limits, greedy, greedy_answer, temperature, key)

    def feed(drawn: dict[str, Any], request: jax.Array, step: jax.Array, cache: Any) -> Output:
        place = lengths[jnp.clip(request, 0) // group] + step
        return _feed(model, params, policy.column, drawn, request >= 0, place, cache)

    def begin(state: dict[str, Any]) -> dict[str, Any]:
        return _begin(state, first, limits, size)

    def advance(state: dict[str, Any]) -> dict[str, Any]:
        waiting = jnp.any(state["request"] < 0) & (state["next"] < size.requests)
        return _advance(jax.lax.cond(waiting, begin, lambda state: state, state), first, draw, feed, size)

    def going(state: dict[str, Any]) -> jax.Array:
        return jnp.any(state["request"] >= 0) | (state["next"] < size.requests)

    final = jax.lax.while_loop(going, advance, begin(_initial(first, draw, limits, size)))
    out, flags = final["out"], final["flags"]
    kind, token, log_prob = (out[name] for name in ("kind", "token", "log_prob"))
    return Rollouts(kind, token, log_prob, out["record"], flags["stopped"], flags["ended"], final["steps"])


class _Size(NamedTuple):
    requests: int  # R
    group: int  # G
    slots: int  # W
    prompt: int  # P


def _begin(state: dict[str, Any], first: Output, limits: Limits, size: _Size) -> dict[str, Any]:
    """Gives the next requests to the slots that are free."""
    free = state["request"] < 0
    new = state["next"] + jnp.cumsum(free) - 1
    taken = free & (new < size.requests)
    request = jnp.where(taken, new, state["request"])
    source = jnp.clip(request, 0) // size.group
    fresh = {name: _where(taken, x, state["slots"][name]) for name, x in _fresh(limits, size.slots).items()}
    return state | {
        "request": request,
        "next": state["next"] + jnp.sum(taken),
        "slots": fresh,
        "cache": _insert(state["cache"], first.cache, source, taken, size.prompt),
        "hidden": jnp.where(taken[:, None], first.hidden[source, -1], state["hidden"]),
    }


def _advance(state: dict[str, Any], first: Output, draw: Any, feed: Any, size: _Size) -> dict[str, Any]:
    """Draws once in every slot and feeds it."""
    request, slots, cache = state["request"], state["slots"], state["cache"]
    live = request >= 0
    drawn, after, done = draw(first._replace(hidden=state["hidden"], cache=None), request, slots)
    drawn["kind"] = jnp.where(live, drawn["kind"], NOTHING).astype(jnp.int8)
    row = jnp.where(live, request, size.requests)  # what a free slot draws goes to row R, which is not there
    out = jax.tree.map(lambda old, x: old.at[row, slots["step"]].set(x, mode="drop"), state["out"], drawn)
    flags = {name: old.at[row].set(after[name], mode="drop") for name, old in state["flags"].items()}
    cache = dataclasses.replace(cache, index=cache.index % cache.segments.shape[1])
    fed = feed(drawn, request, slots["step"], cache)
    return state | {
        "cache": fed.cache,
        "hidden": fed.hidden[:, -1],
        "request": jnp.where(done, -1, request),
        "slots": after,
        "out": out,
        "flags": flags,
        "steps": state["steps"] + 1,
    }


def _prefill(model: Model, params: Params, prompts: jax.Array, segments: jax.Array) -> Output:
    """Returns what the model says of the prompts, with a cache of their length."""
    used = (segments > 0).astype(jnp.int32)
    places = jnp.maximum(jnp.cumsum(used, axis=1) - 1, 0)
    task = jnp.zeros(prompts.shape[:1], jnp.int32)
    batch = Batch(prompts, prompts, used.astype(jnp.float32), used, places, task)
    output = model.apply(params, batch, cache=prompts.shape[1])
    return output._replace(hidden=output.hidden[:, -1:])


def _initial(first: Output, draw: Any, limits: Limits, size: _Size) -> dict[str, Any]:
    """Returns the state with all slots free."""
    requests, width, ring = size.requests, size.slots, size.prompt + limits.total

    def ring_of(x: jax.Array) -> jax.Array:  # [N, G, P, K]
        return jnp.zeros((width, x.shape[1], ring, x.shape[3]), x.dtype)

    row = jnp.zeros((width, ring), jnp.int32)
    cache = dataclasses.replace(
        first.cache,
        keys=tuple(map(ring_of, first.cache.keys)),
        values=tuple(map(ring_of, first.cache.values)),
        segments=row,
        positions=row,
        index=jnp.int32(first.cache.segments.shape[1]),
    )
    free = jnp.full((width,), -1, jnp.int32)
    hidden = jnp.zeros((width, first.hidden.shape[-1]), first.hidden.dtype)
    blank = _fresh(limits, width)
    shapes = jax.eval_shape(draw, first._replace(hidden=hidden, cache=None), free, blank)[0]
    shapes["kind"] = jax.ShapeDtypeStruct((width,), jnp.int8)
    out = jax.tree.map(lambda x: jnp.zeros((requests, limits.total, *x.shape[1:]), x.dtype), shapes)
    flags = {name: jnp.zeros((requests,), bool) for name in ("stopped", "ended")}
    counts = {"next": jnp.int32(0), "steps": jnp.int32(0)}
    return {"cache": cache, "hidden": hidden, "request": free, "slots": blank, "out": out, "flags": flags, **counts}


def _fresh(limits: Limits, width: int) -> Slots:
    """Returns the slots at the beginning of their rows."""
    zero = jnp.zeros((width,), jnp.int32)
    window = max(map(len, limits.stop), default=1)
    return {
        "phase": jnp.full((width,), THOUGHT if limits.thoughts else (FORCED if limits.late else ANSWER), jnp.int32),
        "step": zero,  # steps of the row
        "inside": zero,  # steps of the phase
        "recent": jnp.full((width, window), -1, jnp.int32),  # last tokens of the shadow
        "stopped": jnp.zeros((width,), bool),
        "ended": jnp.zeros((width,), bool),
    }


def _insert(cache: Any, prompts: Any, source: jax.Array, taken: jax.Array, length: int) -> Any:
    """Returns the cache with the prompts `source` in the slots `taken`, right before the place that is written next."""
    ring = cache.segments.shape[1]
    places = (cache.index - length + jnp.arange(length)) % ring

    def store(old: jax.Array, new: jax.Array) -> jax.Array:  # [W, G, ring, K], [N, G, P, K]
        return old.at[:, :, places].set(_where(taken, new[source], old[:, :, places]))

    def note(old: jax.Array, new: jax.Array) -> jax.Array:  # [W, ring], [N, P]
        return jnp.where(taken[:, None], jnp.zeros_like(old).at[:, places].set(new[source]), old)

    return dataclasses.replace(
        cache,
        keys=tuple(map(store, cache.keys, prompts.keys)),
        values=tuple(map(store, cache.values, prompts.values)),
        segments=note(cache.segments, prompts.segments),
        positions=note(cache.positions, prompts.positions),
    )


def _feed(
    model: Model, params: Params, column: str, drawn: dict[str, Any], live: jax.Array, place: jax.Array, cache: Any
) -> Output:
    """Returns what the model says after what was drawn."""
    token, inside = drawn["token"][:, None], live.astype(jnp.int32)[:, None]
    extra = {}
    if "thought" in drawn["record"]:
        soft = live & (drawn["kind"] == THOUGHT)
        extra = {column: drawn["record"]["thought"][:, None], "soft": soft[:, None]}
    weights = jnp.zeros(token.shape, jnp.float32)
    batch = Batch(token, token, weights, inside, place[:, None], jnp.zeros(token.shape[:1], jnp.int32), extra)
    return model.apply(params, batch, cache=cache)


def _drawing(policy: Policy, limits: Limits, greedy: bool, greedy_answer: bool, temperature: float, key: Key) -> Any:
    """Returns the function (output, request [W], slots) -> (drawn, slots afterwards, whether the rows are done)."""

    def draw(output: Output, request: jax.Array, slots: Slots) -> tuple[dict[str, Any], Slots, jax.Array]:
        logits, table = output.logits, output.embedding  # [W, V]
        assert table is not None
        keys = jax.vmap(lambda r, t: jax.random.fold_in(jax.random.fold_in(key, r), t))(request, slots["step"])
        phase = slots["phase"]

        def think() -> tuple[Record, jax.Array]:
            if greedy:
                return policy.greedy(logits, table)[1], jnp.zeros(logits.shape[:1])
            _, record = jax.vmap(policy.sample, in_axes=(0, None, 0))(logits, table, keys)
            return record, policy.log_prob(logits, table, record)

        def answer() -> tuple[jax.Array, jax.Array]:
            if greedy_answer:
                return thoughts.shadow(logits), jnp.zeros(logits.shape[:1])
            scores = logits / temperature
            token = jax.vmap(categorical)(keys, scores)
            return token, vocabulary.select(scores, token)[0]

        record, thought_log_prob = _if_any((request >= 0) & (phase == THOUGHT), think)
        token, log_prob = _if_any((request >= 0) & (phase == ANSWER), answer)
        kinds = [phase == THOUGHT, phase == FORCED]
        token = jnp.select(kinds, [record["token"], _forced(limits, slots)], token).astype(jnp.int32)
        log_prob = jnp.select(kinds, [thought_log_prob, jnp.zeros_like(log_prob)], log_prob)
        record = {name: _where(phase == THOUGHT, x, jnp.zeros_like(x)) for name, x in record.items() if name != "token"}
        after, done = _transition(limits, slots, token)
        return {"kind": phase, "token": token, "log_prob": log_prob, "record": record}, after, done

    return draw


def _if_any(mask: jax.Array, run: Callable[[], Any]) -> Any:
    """Returns what `run` does, or zeros like it if the mask holds nowhere: mostly all slots are in one phase."""
    shapes = jax.eval_shape(run)
    return jax.lax.cond(jnp.any(mask), run, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def _forced(limits: Limits, slots: Slots) -> jax.Array:
    """Returns the token that is forced next, int32 [W]."""
    size = max(len(limits.forced), len(limits.late), 1)
    queues = jnp.array([[*q, *[0] * (size - len(q))] for q in (limits.late, limits.forced)], jnp.int32)
    return queues[slots["stopped"].astype(jnp.int32), jnp.clip(slots["inside"], 0, size - 1)]


def _transition(limits: Limits, slots: Slots, token: jax.Array) -> tuple[Slots, jax.Array]:
    """Returns the slots after a token, and which rows are done, bool [W]."""
    phase, inside = slots["phase"], slots["inside"] + 1
    recent = jnp.concatenate([slots["recent"][:, 1:], token[:, None]], axis=1)
    stop = (phase == THOUGHT) & _ends_with(recent, limits.stop)
    stopped = slots["stopped"] | stop
    queue = jnp.where(stopped, len(limits.forced), len(limits.late))
    over = jnp.select(
        [phase == THOUGHT, phase == FORCED],
        [stop | (inside >= limits.thoughts), inside >= queue],
        jnp.zeros_like(stop),
    )
    following = jnp.where((phase == THOUGHT) & (queue > 0), FORCED, ANSWER)
    ended = (phase == ANSWER) & jnp.isin(token, jnp.array(limits.end, jnp.int32))
    done = (phase == ANSWER) & (ended | (inside >= limits.answer))
    if not limits.answer:
        done = over & (following == ANSWER)
    after = {
        "phase": jnp.where(over, following, phase),
        "step": slots["step"] + 1,
        "inside": jnp.where(over, 0, inside),
        "recent": recent,
        "stopped": stopped,
        "ended": ended,
    }
    return after, done


def _ends_with(recent: jax.Array, phrases: Sequence[Sequence[int]]) -> jax.Array:
    """Returns whether the last tokens [W, S] end with one of the phrases, bool [W]."""
    hit = jnp.zeros(recent.shape[:1], bool)
    for phrase in phrases:
        hit |= jnp.all(recent[:, recent.shape[1] - len(phrase) :] == jnp.array([phrase], jnp.int32), axis=1)
    return hit


def _where(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new` in the rows where `mask` [W] holds, else `old`."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - 1)), new, old)
