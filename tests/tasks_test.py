"""Verifiable tasks against enumeration and breadth-first search written another way; splits, shortcuts, files."""

import collections
import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data import tokenizer
from jaxcl.rl import evaluate, tasks
from jaxcl.rl.tasks import mnns, reach
from jaxcl.schema import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
GENERATED = (
    {"name": "mnns", "count": 3, "low": 1, "high": 6},
    {"name": "mnns", "count": 4, "low": 1, "high": 99, "problems": 60},
    {"name": "modular", "count": 3, "modulus": 5},
    {"name": "reach", "nodes": 10, "problems": 60},
)


def values(problems, tokens):
    """The numbers that tokens of sums, digits or nodes stand for."""
    return [int(problems.names[t].lstrip("DS")) for t in np.ravel(tokens)]


def digits_of(problems):
    return [tuple(values(problems, row[1:])) for row in problems.prompts]


def signed(digits):
    """All paths of partial sums, one per choice of signs."""
    choices = itertools.product((1, -1), repeat=len(digits))
    return [list(itertools.accumulate(s * d for s, d in zip(choice, digits, strict=True))) for choice in choices]


@pytest.mark.parametrize(
    "options", [{"count": 3, "low": 1, "high": 6}, {"count": 4, "low": 0, "high": 3}, {"count": 2}]
)
def test_mnns_equals_enumeration(options):
    problems = tasks.make({"name": "mnns", **options})
    for part in (problems, problems.held_out):
        dense = part.targets.dense(np.arange(len(part.prompts)), part.vocab)
        for i, digits in enumerate(digits_of(part)):
            paths = signed(digits)
            right = min(path[-1] for path in paths if path[-1] >= 0)
            assert values(part, part.answers[i]) == [right]
            trace = [*values(part, part.traces[i]), right]
            assert trace in paths, "the chain is a path of some signs to the answer"
            for t in range(part.thoughts):
                counts = collections.Counter(path[t] for path in paths)
                expected = np.zeros(part.vocab)
                for value, count in counts.items():
                    expected[part.names.index(f"S{value}")] = count / len(paths)
                np.testing.assert_allclose(dense[i, t], expected, atol=1e-7)
            assert part.verify(i, part.answers[i]) == 1
            assert part.verify(i, [part.names.index(f"S{right + 1}")]) == 0


@pytest.mark.parametrize(
    ("count", "high", "majority", "parity"), [(3, 20, 0.1355, 0.257125), (4, 9, 0.372504, 0.611645)]
)
def test_mnns_shortcuts_are_the_published_ones(count, high, majority, parity):
    digits = tasks.sequences("mnns", 1, high, count, None, 0)
    assert len(digits) == high**count
    answers = mnns.best(digits)[0]
    assert tasks.guess(answers) == pytest.approx(majority, abs=1e-6)
    assert tasks.guess(answers, digits.sum(axis=1) % 2) == pytest.approx(parity, abs=1e-6)


@pytest.mark.parametrize("options", GENERATED[:3], ids=lambda o: o["name"])
def test_shortcuts_are_those_of_the_part(options):
    problems = tasks.make(options)
    for part in (problems, problems.held_out):
        answers = values(part, part.answers)
        by_parity = collections.defaultdict(collections.Counter)
        for digits, answer in zip(digits_of(part), answers, strict=True):
            by_parity[sum(digits) % 2][answer] += 1
        assert part.baselines["majority"] == max(collections.Counter(answers).values()) / len(answers)
        assert part.baselines["parity"] == sum(max(c.values()) for c in by_parity.values()) / len(answers)
    assert problems.baselines != problems.held_out.baselines


@pytest.mark.parametrize("options", GENERATED[:3], ids=lambda o: o["name"])
def test_no_permutation_is_in_both_parts(options):
    problems = tasks.make(options)
    train, held = ({tuple(sorted(d)) for d in digits_of(p)} for p in (problems, problems.held_out))
    assert not train & held
    assert len(held) == round(0.2 * len(train | held))
    assert len(set(digits_of(problems))) == len(problems.prompts), "each once"
    if "problems" not in options:
        width = options.get("high", options.get("modulus"))
        assert len(problems.prompts) + len(problems.held_out.prompts) == width ** options["count"]


def test_modular_sums():
    problems = tasks.make({"name": "modular", "count": 3, "modulus": 5})
    for part in (problems, problems.held_out):
        for digits, trace, answer in zip(digits_of(part), part.traces, part.answers, strict=True):
            assert values(part, [*trace, *answer]) == [digits[0], sum(digits[:2]) % 5, sum(digits) % 5]


def parsed(problems, i):
    """Edges, root and targets of a prompt, read from its words."""
    words = [problems.names[t] for t in problems.prompts[i][problems.segments[i] > 0]]
    question, mark = words.index("[Q]"), words.index("[R]")
    assert words[0] == "<bos>"
    assert set(words[3:question:3]) == {"|"}
    edges = [(int(words[k]), int(words[k + 1])) for k in range(1, question, 3)]
    return edges, int(words[mark + 1]), [int(w) for w in words[question + 1 : mark]]


def reached(edges, root):
    """Sets of nodes at each distance, by powers of the adjacency matrix."""
    size = 1 + max(itertools.chain(*edges))
    step = np.zeros((size, size), int)
    for a, b in edges:
        step[a, b] = 1
    known, border, levels = {root}, np.eye(size, dtype=int)[root], [{root}]
    while levels[-1]:
        border = border @ step
        levels.append({int(n) for n in np.flatnonzero(border)} - known)
        known |= levels[-1]
    return levels


@pytest.mark.parametrize("steps", [2, 3])
def test_reach_equals_matrix_powers(steps):
    problems = tasks.make({"name": "reach", "nodes": 12, "steps": steps, "problems": 80})
    for part in (problems, problems.held_out):
        dense = part.targets.dense(np.arange(len(part.prompts)), part.vocab)
        for i in range(len(part.prompts)):
            edges, root, targets = parsed(part, i)
            assert len(set(edges)) == len(edges)
            levels = reached(edges, root)
            right = [t for t in targets if any(t in level for level in levels)]
            assert right == values(part, part.answers[i]), "one of the two targets, and it is the answer"
            assert right[0] in levels[steps], "at the distance asked for"
            path = [root, *values(part, part.traces[i]), *right]
            assert all(edge in edges for edge in itertools.pairwise(path))
            for t in range(1, steps):
                within = set().union(*levels[1 : t + 1])
                names = {int(part.names[k]): float(p) for k, p in enumerate(dense[i, t - 1]) if p}
                assert names == pytest.approx(dict.fromkeys(within, 1 / len(within)))
            wrong = next(t for t in targets if t not in right)
            assert part.verify(i, [part.names.index(str(wrong))]) == 0
            ways = [reached(edges, node) for node in {a for a, _ in edges} - {root}]
            assert any(len(way) > steps and wrong in way[steps] for way in ways), "the other target is as deep"


def test_reach_cannot_be_guessed():
    problems = tasks.make({"name": "reach", "problems": 1000})
    assert all(value < 0.56 for value in problems.baselines.values()), problems.baselines
    assert problems.baselines["place"] == problems.held_out.baselines["place"] == 0.5
    keys = []
    for part in (problems, problems.held_out):
        found = (parsed(part, i) for i in range(len(part.prompts)))
        keys.append({(frozenset(e), r, frozenset(t)) for e, r, t in found})
    assert not keys[0] & keys[1]
    assert len(keys[0]) == len(problems.prompts)


@pytest.mark.parametrize("options", GENERATED, ids=lambda o: o["name"])
def test_the_same_seed_gives_the_same_problems(options):
    one, again, other = (tasks.make(options | {"seed": seed}) for seed in (1, 1, 2))
    for part in ("prompts", "segments", "answers", "traces"):
        np.testing.assert_array_equal(getattr(one, part), getattr(again, part))
        np.testing.assert_array_equal(getattr(one.held_out, part), getattr(again.held_out, part))
    assert one.baselines == again.baselines
    assert not np.array_equal(one.prompts, other.prompts)
    json.dumps(one.description)


@pytest.mark.parametrize("options", GENERATED, ids=lambda o: o["name"])
def test_shapes_and_padding(options):
    problems = tasks.make(options)
    for part in (problems, problems.held_out):
        n = len(part.prompts)
        assert part.prompts.dtype == part.segments.dtype == part.answers.dtype == part.traces.dtype == np.int32
        assert part.segments.shape == part.prompts.shape
        assert part.answers.shape == (n, 1)
        assert part.traces.shape == (n, part.thoughts)
        assert len(part.names) == part.vocab
        assert max(part.prompts.max(), part.answers.max(), part.traces.max()) < part.vocab
        assert (np.diff(part.segments, axis=1) >= 0).all(), "padding is on the left"
        assert ((part.prompts == part.pad) == (part.segments == 0)).all()
        assert part.licence == "generated"
        if part.targets is not None:
            assert part.targets.tokens.shape[:2] == (n, part.thoughts)
            np.testing.assert_allclose(part.targets.shares.sum(axis=-1), 1, rtol=1e-6)
            rows = np.array([n - 1, 0])
            dense = part.targets.dense(rows, part.vocab)
            assert dense.shape == (2, part.thoughts, part.vocab)
            assert dense.dtype == np.float32
            best = part.traces[rows]
            assert (np.take_along_axis(dense, best[..., None], axis=2) > 0).all(), "the chain is one of the branches"


def test_many_digits_need_little_memory():
    problems = tasks.make({"name": "mnns", "count": 4, "high": 99, "problems": 1000})
    assert problems.vocab > 800
    assert problems.targets.tokens.shape == (len(problems.prompts), 3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnns", "count": 1}, "count=1: must be from 2"),
        ({"name": "mnns", "low": 5, "high": 5}, "low=5, high=5"),
        ({"name": "mnns", "high": 200}, "problems=None: mnns has 8000000"),
        ({"name": "mnns", "high": 2, "problems": 9}, "problems=9: mnns has 8"),
        ({"name": "mnns", "held_out": 1.0}, "held_out=1.0"),
        ({"name": "mnns", "digits": 3}, "config.task.digits: unknown key"),
        ({"name": "modular", "modulus": 1}, "modulus=1"),
        ({"name": "reach", "nodes": 5}, "nodes=5: must be at least"),
        ({"name": "reach", "steps": 1}, "steps=1"),
        ({"name": "mnsn"}, "did you mean 'mnns'"),
        ({"name": "questions", "path": "x.jsonl"}, "needs a tokenizer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message) as caught:
        tasks.make(options)
    assert "\n" not in str(caught.value)


# Questions of files


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


GSM = [{"question": f"What is {i} + {i}?", "answer": f"It is {i}+{i}.\n#### {2 * i:,}"} for i in range(600, 620)]


def test_marked_answers(tmp_path):
    path = write(tmp_path / "train.jsonl", GSM)
    coder = tokenizer.make()
    problems = tasks.make({"name": "questions", "path": path, "held_out": 0.25}, coder)
    assert len(problems.prompts) == 15
    assert len(problems.held_out.prompts) == 5
    texts = [coder.decode(row) for part in (problems, problems.held_out) for row in part.prompts]
    assert len(set(texts)) == 20
    for text, answer, worked in zip(texts, problems.answers, problems.worked, strict=False):
        number = int(text.split("What is ")[1].split(" +")[0])
        assert answer == f"{2 * number:,}"
        assert worked == f"It is {number}+{number}."
        assert "\\boxed{result}" in text
    assert problems.verify(0, f"so \\boxed{{{problems.answers[0].replace(',', '')}}}") == 1
    assert problems.verify(0, "so \\boxed{1}") == problems.verify(0, problems.answers[0]) == 0
    assert (problems.prompts[np.arange(15), problems.segments.argmax(axis=1)] == coder.bos).all()


def test_fields_files_and_rewards(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"Body": f"Ann has {i} pens.", "Question": "How many?", "Answer": float(i)} for i in range(8)]
    parquet.write_table(pa.Table.from_pylist(rows[:6]), tmp_path / "train.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[6:]), tmp_path / "test.parquet")
    options = {"name": "questions", "form": "plain", "question": ["Body", "Question"], "answer": "Answer"}
    options |= {"path": str(tmp_path / "train.parquet"), "held_out": str(tmp_path / "test.parquet"), "licence": "MIT"}
    options |= {"template": "Q {question} A", "verifier": {"name": "boxed", "partial": 0.1, "scale": 100.0}}
    problems = tasks.make(options, tokenizer.make())
    assert problems.answers == ("0", "1", "2", "3", "4", "5")
    assert problems.held_out.answers == ("6", "7")
    assert problems.held_out.licence == "MIT"
    assert tokenizer.make().decode(problems.prompts[3]) == "Q Ann has 3 pens. How many? A"
    assert [problems.verify(3, t) for t in ("\\boxed{3}", "\\boxed{4}", "3")] == [100, 10, 0]


def test_multiple_choice(tmp_path):
    records = [
        {"question": "Red?", "choices": ["yes", "no"], "answer": 1},
        {"question": "Blue?", "choices": {"text": ["u", "v", "w"], "label": ["1", "2", "3"]}, "answer": "3"},
        {"question": "Sky?", "choices": ["up", "down"], "answer": "up"},
        {"question": "Sea?", "choices": ["up", "down"], "answer": "B"},
    ]
    path = write(tmp_path / "a.jsonl", records)
    problems = tasks.make({"name": "questions", "path": path, "form": "choice", "held_out": path}, tokenizer.make())
    assert problems.answers == ("B", "C", "A", "B")
    assert "(A) yes\n(B) no\n" in tokenizer.make().decode(problems.prompts[0])
    assert problems.baselines == {"majority": 0.5}
    assert problems.verify(0, "The answer is (B).") == 1
    assert problems.verify(0, "(A)") == 0


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (GSM[:2], {"question": "q"}, r"a.jsonl:1: has no field 'q'; it has question, answer"),
        ([{"question": "x", "answer": "5"}], {}, r"a.jsonl:1: answer has no result behind '####'"),
        ([{"question": "x", "answer": [5]}], {}, r"expected a text or a number"),
        (GSM, {"longest": 40}, r"a.jsonl:1: prompt of \d+ tokens; config.task.longest=40"),
        (GSM, {"template": "no place"}, r"template='no place'"),
        (GSM, {"verifier": {"name": "box"}}, r"did you mean 'boxed'"),
        (GSM, {"verifier": {"name": "boxed", "part": 1}}, r"config.verifier.part: unknown key"),
        ([{"question": "x", "choices": ["a"], "answer": 0}], {"form": "choice"}, r"expected a list of 2 to 10"),
        ([{"question": "x", "choices": ["a", "b"], "answer": 2}], {"form": "choice"}, r"answer 2: expected an index"),
        (GSM, {"verifier": {"partial": 0.1}}, r"config.verifier: expected a dict with a 'name'"),
        ([], {}, "have no question"),
    ],
)
def test_bad_questions(tmp_path, records, options, message):
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=message) as caught:
        tasks.make({"name": "questions", "path": path, "held_out": 0.5, **options}, tokenizer.make())
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="no GSM8K here")
def test_gsm8k():
    options = {"path": f"{DATA}/gsm8k/train.jsonl", "held_out": f"{DATA}/gsm8k/test.jsonl", "problems": 200}
    problems = tasks.make({"name": "questions", **options}, tokenizer.make())
    assert len(problems.prompts) == len(problems.held_out.prompts) == 200
    assert problems.answers[0] == "72"
    for i, gold in enumerate(problems.answers):
        assert problems.verify(i, f"It is \\boxed{{{gold.replace(',', '')}.00}}") == 1
        assert problems.verify(i, f"It is \\boxed{{{gold}1}}") == 0


@pytest.mark.skipif(not (DATA / "prosqa").is_dir(), reason="no ProsQA here")
def test_search_agrees_with_prosqa():
    for record in json.loads((DATA / "prosqa" / "prosqa_test.json").read_text()):
        edges = [tuple(edge) for edge in record["edges"]]
        found = reach.distances(edges, record["root"])
        assert found[record["target"]] == len(record["steps"])
        assert record["neg_target"] not in found
        assert len(reach.path(edges, record["root"], record["target"])) == len(record["steps"]) + 1


# Figures


def brute(n, c, k):
    tried = list(itertools.combinations([1] * c + [0] * (n - c), k))
    return sum(map(any, tried)) / len(tried)


def test_pass_at_k_equals_brute_force():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            assert float(evaluate.pass_at(k, n, c)) == pytest.approx(brute(n, c, k), rel=1e-12)


def test_pass_at_k_of_many_samples():
    assert float(evaluate.pass_at(5000, 10**6, 1)) == pytest.approx(0.005, rel=1e-12)
    assert float(evaluate.pass_at(1, 10**9, 1)) == pytest.approx(1e-9, rel=1e-12)
    np.testing.assert_array_equal(evaluate.pass_at(4, np.array([8, 8, 4]), np.array([0, 8, 1])), [0, 1, 1])
    rewards = np.array([[1, 0.1, 0.1, 0], [1, 1, 0, 1]])
    figures = evaluate.pass_figures(rewards, (1, 2))
    assert figures == pytest.approx({"pass@1": 0.5, "pass@2": 0.75})
    for k, n, c in ((0, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, -1)):
        with pytest.raises(UserError, match="pass@k"):
            evaluate.pass_at(k, n, c)


@given(st.lists(st.floats(-50, 50), min_size=5, max_size=5))
def test_entropy(logits):
    p = np.exp(np.array(logits) - max(logits))
    p /= p.sum()
    expected = -sum(x * np.log(x) for x in p if x > 0)
    assert float(evaluate.entropy(jnp.array(logits))) == pytest.approx(expected, abs=1e-5)


def test_entropy_profile():
    entropies = np.array([[4.0, 3, 2, 1], [2.0, 1, np.nan, 9]])
    weights = np.array([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_allclose(evaluate.entropy_profile(entropies, weights), [3, 2, 2, 1])
    np.testing.assert_allclose(evaluate.entropy_profile(entropies, weights, bins=2), [3, 4 / 3])
    assert np.isnan(evaluate.entropy_profile(entropies, weights * [1, 0, 1, 1])[1])
    assert float(evaluate.entropy(jnp.array([0.0, -jnp.inf]))) == 0
    with pytest.raises(UserError, match="bins=0"):
        evaluate.entropy_profile(entropies, weights, bins=0)
