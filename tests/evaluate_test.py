"""Evaluation: log-likelihoods against whole forward passes in float64, planted facts, sweeps, and bad input."""

import functools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import small
import toys

from jaxcl import losses, metrics, train
from jaxcl.data import tokenizer
from jaxcl.evaluate import __main__ as command
from jaxcl.evaluate import engine as engines
from jaxcl.evaluate import harness, measure, subject, tasks
from jaxcl.models import transformer
from jaxcl.schema import UserError
from jaxcl.types import Batch

WORDS = tokenizer.make()


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """Compiling is most of the cost of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SHAPE = {"vocab": 264, "layers": 1, "embed": 16, "heads": 2, "mlp": 32, "max_length": 64, "init_std": 0.4}
MODEL = transformer.make(**SHAPE)


@functools.cache
def params():
    return toys.quick(MODEL.init)(jax.random.key(1))


@functools.cache
def engine():
    return engines.make(MODEL, WORDS, max_length=64, window=20)


@functools.cache
def forward():
    return toys.quick(MODEL.apply)


def log_softmax64(tokens):
    """Returns log-probabilities [n - 1, V] of the tokens that follow, float64, by a forward pass on one row of 64."""
    n = len(tokens) - 1
    row, place = np.zeros((1, 64), np.int32), np.arange(64, dtype=np.int32)[None]
    row[0, :n] = tokens[:-1]
    segments = (place < n).astype(np.int32)
    batch = Batch(row, row, np.ones((1, 64), np.float32), segments, place, np.zeros(1, np.int32))
    logits = np.asarray(forward()(params(), batch).logits[0, :n], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def direct(context, continuation):
    """Returns log-probability and greediness of a continuation for the byte tokenizer."""
    given, after = [256, *context.encode()], list(continuation.encode())
    table = log_softmax64([*given, *after])[len(given) - 1 :]
    picked = [table[i, t] for i, t in enumerate(after)]
    return sum(picked), all(table[i].argmax() == t for i, t in enumerate(after))


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def figures(path, *, shots=0, own=None, **options):
    task = tasks.read_all([str(path)], shots=shots)[0]
    return measure.prepare(task, engine(), measure.Options(**options))(own or params(), None)


def test_log_likelihoods_are_those_of_whole_forward_passes():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc de"), n)) + "x" for n in (1, 3, 30, 50, 12, 31, 7)]
    asked = [(text, f"y{i}") for i, text in enumerate(texts)]
    best = log_softmax64([256, *b"abc", 0])[-1].argmax()
    requests = [engines.pair(WORDS, *pair) for pair in asked]
    requests.append(engines.Request(np.array([256, *b"abc", best], np.int32), 1))
    scores = engines.log_likelihoods(engine(), params(), requests)
    want = [direct(*pair) for pair in asked]
    np.testing.assert_allclose([s.log_probability for s in scores[:-1]], [w[0] for w in want], rtol=1e-5)
    assert [s.greedy for s in scores] == [*(w[1] for w in want), True]


def test_white_space_before_the_answer_is_scored_with_it():
    request = engines.pair(WORDS, "ab \n", "cd")
    assert bytes(request.tokens[-request.scored :].tolist()) == b" \ncd"
    joined = WORDS._replace(encode=lambda text: np.array(merged(text), np.uint32))
    request = engines.pair(joined, "xa", "by")  # "ab" is one token: x ab y
    assert request.tokens.tolist() == [256, ord("x"), 0, ord("y")]
    assert request.scored == 1


def merged(text):
    """Encodes bytes, with `ab` as the token 0."""
    return list(text.encode().replace(b"ab", b"\0"))


def test_choices_are_ranked_by_likelihood_and_by_likelihood_per_byte(tmp_path):
    rng = np.random.default_rng(3)
    records = [
        {
            "question": f"q{i} " + "abc"[i % 3],
            "choices": ["".join(rng.choice(list("abcdé"), n)) for n in rng.integers(1, 12, 4)],
            "answer": int(rng.integers(4)),
        }
        for i in range(12)
    ]
    records[0]["answer"] = records[0]["choices"][2]
    found = figures(write(tmp_path / "t.jsonl", *records))["all"]
    right = np.zeros(2)
    for i, record in enumerate(records):
        gold = 2 if i == 0 else record["answer"]
        values = np.array([direct(record["question"], " " + c)[0] for c in record["choices"]])
        sizes = np.array([len(c.encode()) for c in record["choices"]])
        right += [values.argmax() == gold, (values / sizes).argmax() == gold]
    assert found == {"acc": right[0] / 12, "acc_norm": right[1] / 12, "records": 12}
    assert right[0] != right[1]


def test_the_windows_of_a_long_text_score_every_token_once(tmp_path):
    text = "abcdefghij" * 5 + "é"
    tokens = np.array([256, *text.encode()])
    rows = list(engines.windows(tokens, 20))
    scored = np.concatenate([row.tokens[len(row.tokens) - row.scored :] for row in rows])
    np.testing.assert_array_equal(scored, tokens[1:])
    assert [len(row.tokens) - 1 for row in rows] == [20, 20, 20]  # the last is filled with context
    nats = 0.0
    for row in rows:
        table = log_softmax64(row.tokens)[-row.scored :]
        nats -= sum(table[i, t] for i, t in enumerate(row.tokens[-row.scored :]))
    found = figures(write(tmp_path / "t.jsonl", {"text": text}))["all"]
    assert found["nats_per_token"] == pytest.approx(nats / 52, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 52, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / 52), rel=1e-5)


@functools.cache
def taught():
    """Returns parameters after no, and after enough training on two facts."""

    def row(text):
        tokens = np.zeros(40, np.int32)
        tokens[: len(text) + 2] = [256, *text.encode(), 257]
        used = (np.arange(39) < len(text) + 1).astype(np.int32)
        return tokens[:-1], tokens[1:], used.astype(np.float32), used, np.arange(39, dtype=np.int32) * used

    stacked = [np.stack(c) for c in zip(row("sky is blue"), row("sum: #### 1,042"), strict=True)]
    batch = Batch(*stacked, np.zeros(2, np.int32))
    tx = optax.adam(1e-2)

    @jax.jit
    def train_on(state):
        def step(carry, _):
            p, o = carry
            grads = jax.grad(lambda q: losses.cross_entropy(MODEL.apply(q, batch), batch)[0])(p)
            moves, o = tx.update(grads, o)
            return (optax.apply_updates(p, moves), o), None

        return jax.lax.scan(step, state, None, length=120)[0][0]

    return train_on((params(), tx.init(params())))


def test_a_planted_fact_is_learned_and_the_other_is_not(tmp_path):
    path = write(
        tmp_path / "facts.jsonl",
        {"prompt": "sky is", "answer": "blue", "stage": "first"},
        {"prompt": "sea is", "answer": "deep", "stage": "second"},
        {"prompt": "sky is", "answer": "green", "stage": "second"},
    )
    before, after = figures(path), figures(path, own=taught())
    assert before["first"]["log_probability"] == pytest.approx(direct("sky is", " blue")[0], rel=1e-5)
    wanted = np.mean([direct("sea is", " deep")[0], direct("sky is", " green")[0]])
    assert before["second"] == {"log_probability": pytest.approx(wanted, rel=1e-5), "rank_1": 0.0, "records": 2}
    assert after["first"]["log_probability"] > -0.1 > -5 > before["first"]["log_probability"]
    assert (before["first"]["rank_1"], after["first"]["rank_1"], after["second"]["rank_1"]) == (0, 1, 0)


def test_greedy_text_is_extracted_normalised_and_cut(tmp_path):
    rule = r"#### (\S+)"
    record = {"prompt": "sum:", "answer": "because #### 1042.", "extract": rule}
    good = write(tmp_path / "good.jsonl", record)
    assert figures(good, own=taught(), max_tokens=16)["all"] == {"exact_match": 1.0, "records": 1}
    assert figures(good, max_tokens=16)["all"]["exact_match"] == 0.0
    bare = write(
        tmp_path / "bare.jsonl", {"prompt": "sum:", "answer": "#### 1042"}, {"prompt": "sum:", "answer": "1042"}
    )
    assert figures(bare, own=taught(), max_tokens=16)["all"]["exact_match"] == 0.5
    assert figures(bare, own=taught(), max_tokens=16, extract=rule)["all"]["exact_match"] == 1.0
    stopped = write(tmp_path / "stop.jsonl", {"prompt": "sky is", "answer": "b", "stop": ["lu", "zz"]})
    assert figures(stopped, own=taught(), max_tokens=16)["all"]["exact_match"] == 1.0
    assert figures(stopped, own=taught(), max_tokens=1)["all"]["exact_match"] == 0.0
    other = engine()._replace(words=WORDS._replace(eos=ord("u")))  # an end that would show in the text
    assert engines.generations(other, taught(), [engines.begin(WORDS, "sky is")], 16, [], None) == [" bl"]
    assert measure.normalised(" The  $1,042. ") == "the 1042"


def test_examples_stand_before_every_other_record(tmp_path):
    records = [{"prompt": f"p{i}", "choices": ["aa", "b"], "answer": i % 2} for i in range(4)]
    task = tasks.read_all([str(write(tmp_path / "t.jsonl", *records))], shots=2)[0]
    assert [r.prompt for r in task.records] == ["p0 aa\n\np1 b\n\np2", "p0 aa\n\np1 b\n\np3"]
    with pytest.raises(UserError, match="has 4 records"):
        tasks.with_shots(task._replace(records=task.records * 2), 4)


def test_few_shapes_are_compiled():
    made = engines.make(MODEL, WORDS, max_length=64, window=20)
    requests = [engines.pair(WORDS, "a" * (i % 60), "b") for i in range(200)]
    engines.log_likelihoods(made, params(), requests)
    assert made.score._cache_size() == 2


def test_the_adapter_answers_the_requests_of_the_harness():
    def ask(*args):
        return SimpleNamespace(args=args)

    answers = harness.Answers(engine(), params())
    pairs = [("abc", " d"), ("", "xy"), ("ab ", "c"), ("q" * 90, " d")]
    found = answers.loglikelihood([ask(*pair) for pair in pairs])
    want = [direct("abc", " d"), direct("", "xy"), direct("ab", " c")]
    np.testing.assert_allclose([f[0] for f in found[:3]], [w[0] for w in want], rtol=1e-5)
    assert [f[1] for f in found[:3]] == [w[1] for w in want]
    tail = log_softmax64([*b"q" * 63, *b" d"])[-2:]
    assert found[3][0] == pytest.approx(tail[0, ord(" ")] + tail[1, ord("d")], rel=1e-5)  # lost its beginning
    long = "abcdefgh" * 12
    rows = engines.windows(engines.begin(WORDS, long), 64)
    wanted = sum(log_softmax64(r.tokens)[-r.scored + i, t] for r in rows for i, t in enumerate(r.tokens[-r.scored :]))
    assert answers.loglikelihood_rolling([ask("ab"), ask(long)])[1] == pytest.approx(wanted, rel=1e-5)
    taught_answers = harness.Answers(engine(), taught())
    asked = [
        ask("sky is", {"until": ["u"]}),
        ask("sum:", {"until": [], "max_gen_toks": 6}),
        ask("sky", {"until": "ue"}),
    ]
    assert taught_answers.generate_until(asked) == [" bl", " #### ", " is bl"]
    with pytest.raises(UserError, match="do_sample"):
        answers.generate_until([ask("a", {"do_sample": True})])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the tiny model with its checkpoints."""
    folder = tmp_path_factory.getbasetemp() / "small"
    place = tmp_path_factory.mktemp("evaluated") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        settings = small.config(folder, checkpoint__every_steps=8, checkpoint__keep=4)
        assert train.run(settings, str(place)) == 0
    return place


def test_a_sweep_writes_figures_and_a_page_once(run, tmp_path, capsys):
    facts = write(
        tmp_path / "facts.jsonl",
        {"prompt": "wind", "answer": "river", "stage": "stage d0"},
        {"prompt": "road", "answer": "cloud", "stage": "stage d2"},
    )
    command.main([str(run), f"--tasks=held_out,{facts}", "--steps=all"])
    path = run / "evaluations" / "held_out+facts@all.json"
    told = json.loads(path.read_text())
    assert len(told["steps"]) > 1
    assert told["steps"][-1] == small.TOTAL
    evals = {r["step"]: r for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "eval"}
    for step, found in zip(told["steps"], told["tasks"]["held_out"]["figures"], strict=True):
        for domain in ("d0", "d1", "d2"):
            assert found[domain]["nats_per_token"] == pytest.approx(evals[step]["loss"][domain], rel=1e-5)
            assert found[domain]["bits_per_byte"] == pytest.approx(evals[step]["bits_per_byte"][domain], rel=1e-5)
    assert set(told["tasks"]["facts"]["figures"][0]) == {"stage d0", "stage d2"}
    values = [found["stage d0"]["log_probability"] for found in told["tasks"]["facts"]["figures"]]
    assert len(set(values)) == len(values)  # each step has its own weights
    html = path.with_suffix(".html").read_text()
    assert "stage d1" in html
    assert "rank 1" in html
    assert "facts" in capsys.readouterr().out
    before = small.tree_of(run)
    with pytest.raises(UserError, match="--force"):
        command.main([str(run), f"--tasks=held_out,{facts}", "--steps=all"])
    assert small.tree_of(run) == before
    command.main([str(run), f"--tasks={facts}", "--steps=all", f"--out={path}", "--force"])
    assert list(json.loads(path.read_text())["tasks"]) == ["facts"]
    command.main([str(run), f"--tasks={facts}", f"--out={tmp_path / 'one.json'}"])
    assert json.loads((tmp_path / "one.json").read_text())["steps"] == [small.TOTAL]
    assert not (tmp_path / "one.html").exists()
    good = {"prompt": "wind", "answer": "river", "stage": "stage d0"}
    control = write(tmp_path / "control.jsonl", {"prompt": "wind", "answer": "sea", "stage": "none"})
    typo = write(tmp_path / "typo.jsonl", good, good | {"stage": "stage d00"})
    with pytest.raises(
        UserError, match=r"typo.jsonl:2: stage 'stage d00': not a stage.*did you mean 'stage d0'\?.*'none'"
    ):
        command.main([str(run), f"--tasks={typo},{control}"])
    command.main([str(run), f"--tasks={control}"])


def test_half_a_character_is_scored_and_a_nested_line_is_refused(tmp_path):
    own = engine()
    (task,) = tasks.read_all([str(write(tmp_path / "half.jsonl", {"text": "\ud800 a"}))])
    assert measure.prepare(task, own, measure.Options())
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.jsonl:1: not JSON"):
        tasks.read_all([str(tmp_path / "deep.jsonl")])


GOOD = {"prompt": "a", "choices": ["b", "c"], "answer": 0}
BAD = {
    "no file": (None, [], "no such file"),
    "empty": ("", [], "empty"),
    "not json": (json.dumps(GOOD) + "\n{", [], "t.jsonl:2: not JSON"),
    "no object": ("[1]", [], "t.jsonl:1: a list"),
    "keys": ('{"promt": "a", "answer": "b"}', [], "t.jsonl:1: keys promt"),
    "mixed": (json.dumps(GOOD) + '\n\n{"text": "a"}', [], "t.jsonl:3: a record of perplexity"),
    "answer": (json.dumps(GOOD | {"answer": "d"}), [], "not among the choices"),
    "index": (json.dumps(GOOD | {"answer": 2}), [], "0 to 1"),
    "choices": (json.dumps(GOOD | {"choices": ["b"]}), [], "at least two"),
    "type": ('{"text": 3}', [], "expected text"),
    "regex": ('{"prompt": "a", "answer": "b", "extract": "("}', [], "not a regular expression"),
    "long": (json.dumps(GOOD | {"prompt": "a" * 2000}), [], "t.jsonl:1: 200. tokens.*max_length"),
    "long prompt": ('{"prompt": "%s", "answer": "b"}' % ("a" * 2000), [], "t.jsonl:1: a prompt of 2001 tokens"),
    "step": (json.dumps(GOOD), ["--steps=5"], "no checkpoint '5'.*it has .*24"),
    "negative shots": ('{"text": "a"}', ["--shots=-1"], "--shots=-1: must be at least 0"),
    "shots": ('{"text": "a"}', ["--shots=1"], "take examples"),
    "window": ('{"text": "a"}', ["--window=0"], "--window=0"),
    "max tokens": (json.dumps(GOOD), ["--max_tokens=0"], "at least 1"),
    "out": (json.dumps(GOOD), ["--out=x.txt"], ".json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(name, run, tmp_path):
    text, more, words = BAD[name]
    path = tmp_path / "t.jsonl"
    if text is not None:
        path.write_text(text)
    before = small.tree_of(run)
    with pytest.raises(UserError, match=words) as error:
        command.main([str(run), f"--tasks={path}", *more])
    assert "\n" not in str(error.value)
    assert small.tree_of(run) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", GOOD)
    with pytest.raises(UserError, match="no checkpoint to evaluate"):
        command.main([str(tmp_path / "absent"), f"--tasks={path}"])
    assert not (tmp_path / "absent").exists()
    with pytest.raises(UserError, match="comes twice"):
        tasks.read_all([str(path), str(path)])


def test_a_hugging_face_folder_needs_no_run(tmp_path, monkeypatch):
    """The importer has its own tests: here only the way from a folder to figures."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    made = subject.network.Network(MODEL, lambda key, abstract: params(), transformer.shape(**SHAPE))
    monkeypatch.setattr(subject.network, "tokenizer_of", lambda *_: WORDS)
    monkeypatch.setattr(subject.network, "make", lambda *_: made)
    path, out = write(tmp_path / "t.jsonl", {"text": "abc"}), tmp_path / "out.json"
    command.main([str(tmp_path / "model"), f"--tasks={path}", f"--out={out}"])
    nats = json.loads(out.read_text())["tasks"]["t"]["figures"][0]["all"]["nats_per_token"]
    assert nats == pytest.approx(-direct("", "abc")[0] / 3, rel=1e-5)
    before = small.tree_of(tmp_path)
    command.main([str(tmp_path / "model"), f"--tasks={path}"])
    assert small.tree_of(tmp_path) == before
    for more, words in (([f"--tasks={path}", "--steps=all"], "one set of weights"), (["--tasks=held_out"], "no run")):
        with pytest.raises(UserError, match=words):
            command.main([str(tmp_path / "model"), *more])
