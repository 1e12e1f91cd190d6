"""Verifiers: a table of answers, texts that must never raise, and workers that hang, crash and eat memory."""

import os
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxcl.rl import equivalence, tasks, verify
from jaxcl.rl.pool import Pool
from jaxcl.schema import UserError

ROOT = Path(__file__).parent.parent

SAME = [
    ("1/2", "0.5"),
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac12", "$.5$"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", "−0.5"),
    ("1 1/2", "1.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("1234567", "1,234,567.00"),
    (r"1{,}5", r"1{,}5"),
    ("50%", "0.5"),
    ("50%", "50"),
    (r"50\%", "50%"),
    ("12", "12."),
    ("12", r"\$12"),
    ("£1,200", "1200"),
    ("5", "5 apples"),
    ("5 apples", "5"),
    ("5 cm", r"5\text{ cm}"),
    ("5cm", "5 cm"),
    ("5 mile", "5 miles"),
    ("30", r"30^\circ"),
    ("30 square feet", "30"),
    ("1500", r"1.5 \times 10^3"),
    ("0.0015", "1.5e-3"),
    ("5", "x = 5"),
    ("x=5", "y = 5.0"),
    ("+3", "3"),
    ("007", "7"),
    ("{1, 2}", r"\{2, 1\}"),
    (r"\left\{1, \frac12\right\}", "{0.5, 1, 1}"),
    ("1, -2", "-2, 1.0"),
    ("(1, 2)", r"\left( 1, 4/2 \right)"),
    (r"[1, \infty)", "[1.0, ∞)"),
    (r"(-\infty, 1) \cup [2, 3]", r"[2, 3] ∪ (-\infty, 1.0)"),
    ("((1, 2), 3)", "((1, 2.0), 3)"),
    (r"\text{Monday}", "monday"),
    ("x^2 + 1", "x^2+1"),
    ("{}", r"\{\}"),
]
DIFFERENT = [
    ("1/2", "0.51"),
    ("1/3", "0.333"),
    ("1/0", "0"),
    ("12", "1.2"),
    ("12", "112"),
    ("1,234", "1.234"),
    ("-3", "3"),
    ("50%", "5"),
    ("0.5%", "5"),
    ("5 cm", "5 km"),
    ("2x", "2"),
    ("3ab", "3"),
    ("23", "2**3"),
    ("10", "1e1000000000"),
    ("8", "2^3"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("[1, 2)", "[1, 2]"),
    ("{1, 2}", "{1, 2, 3}"),
    ("{1, 2, 3}", "{1, 2}"),
    ("{1, 2}", "(1, 2)"),
    ("(1, 2)", "(1, 2, 3)"),
    ("5", ""),
    ("", ""),
    ("5", "five"),
    ("yes", "no"),
    ("5", "5, 6"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same(gold, answer):
    assert equivalence.equal(gold, answer)
    assert equivalence.equal(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not equivalence.equal(gold, answer)
    assert not equivalence.equal(answer, gold)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"{ { \fbox {7} ", "7"),
        (r"} \boxed{3}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\\boxed", None),
        ("5", None),
    ],
)
def test_boxes(text, box):
    assert equivalence.last_box(text) == box


@pytest.mark.parametrize(
    ("name", "options", "gold", "answer", "reward"),
    [
        ("tokens", {}, [4, 5], [4, 5], 1),
        ("tokens", {}, [4, 5], [4, 5, 6], 0),
        ("tokens", {}, [4, 5], [4], 0),
        ("tokens", {"eos": 2}, [4, 5], [4, 5, 2, 9], 1),
        ("tokens", {"eos": 2}, [4, 5], [4, 2, 5], 0),
        ("exact", {}, "New  York", " new york\n", 1),
        ("exact", {"case": True}, "New York", "new york", 0),
        ("number", {}, "42", "6 times 7 is 42.0 apples.", 1),
        ("number", {}, "#### 1,042", "first 7, then 1042", 1),
        ("number", {}, "42", "42 or 43", 0),
        ("number", {}, "42", "none", 0),
        ("marked", {}, "It is\n#### 72", "48+24\n#### 72", 1),
        ("marked", {}, "72", "#### 71\n#### 72\nmore", 1),
        ("marked", {}, "72", "#### $72.00", 1),
        ("marked", {}, "72", "72", 0),
        ("marked", {}, "72", "#### 73", 0),
        ("marked", {"fallback": True}, "#### 72", "It is 72.", 1),
        ("marked", {"marker": "Answer:"}, "72", "Answer: 72", 1),
        ("boxed", {}, "1/2", r"\boxed{0.5}", 1),
        ("boxed", {}, r"\boxed{1/2}", r"\boxed{0.5}", 1),
        ("boxed", {}, "1/2", r"\boxed{0.6}", 0),
        ("boxed", {"partial": 0.1}, "1/2", r"\boxed{0.6}", 0.1),
        ("boxed", {"partial": 0.1}, "1/2", "0.5", 0),
        ("boxed", {"partial": 0.1, "scale": 100.0}, "1/2", r"\boxed{.5}", 100),
        ("boxed", {"partial": 0.1, "scale": 100.0}, "1/2", r"\boxed{}", 10),
        ("boxed", {"partial": 0.1, "scale": 100.0}, "1/2", r"\boxed{.5", 0),
        ("choice", {}, "B", "B", 1),
        ("choice", {}, "(B)", "I think (A) is wrong, so (B).", 1),
        ("choice", {}, "B", "The answer is B because (A) is wrong", 1),
        ("choice", {}, "B", "Answer: **B**", 1),
        ("choice", {}, "B", "B. the second", 1),
        ("choice", {}, "B", r"A is wrong. \boxed{\text{B}}", 1),
        ("choice", {}, "A", "A train leaves at noon.", 0),
        ("choice", {}, "A", "The answer is a mystery", 0),
        ("choice", {}, "C", "(A)", 0),
        ("choice", {"choices": 2}, "C", "(C)", 0),
        ("choice", {}, "A", "", 0),
    ],
)
def test_rewards(name, options, gold, answer, reward):
    verifier = verify.make(name, **options)
    assert verifier.cheap
    assert verifier.score(gold, answer) == pytest.approx(reward)


def test_deep_and_long_texts_are_compared_as_text():
    deep = ["{" * 400 + digit + "}" * 400 for digit in "12"]
    assert not equivalence.equal(*deep)
    assert equivalence.equal(deep[0], " " + deep[0])
    assert not equivalence.equal("{" * 9 + "1" + "}" * 9, "{" * 9 + "1.0" + "}" * 9)


def test_numbers_in_texts():
    assert equivalence.last_number("from 3 to -4.50") == Fraction(-9, 2)
    assert equivalence.last_number("1,234") == 1234
    assert equivalence.last_number("3/4 of it") == Fraction(3, 4)
    assert equivalence.last_number("") is None


PIECES = [
    r"\boxed{",
    r"\frac{",
    "}",
    "{",
    r"\{",
    r"\}",
    "(",
    "[",
    ")",
    "]",
    ",",
    "1",
    "23",
    "4.5",
    "-6",
    "%",
    "7/8",
    "/0",
]
PIECES += ["1e999", "^", "*", "10^{", "U", r"\cup", "$", "####", "=", "x", "cm", r"\text{", r"\left", ".", "A", "(B)"]
NASTY = [
    "(" * 5000,
    "{" * 300 + "}" * 300,
    r"\boxed{" * 3000,
    "\n" * 20000 + "A",
    "9" * 6000,
    "1," * 140,
    "1 " * 150,
    "{" + ",".join(["{1}"] * 60) + "}",
    "10" + "^{10" * 50,
    "answer" + " " * 20000,
    "\ud800\x00",
    "1e999",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_nasty_texts_are_quick_and_never_raise(text):
    began = time.process_time()
    for name in ("exact", "number", "marked", "boxed", "choice"):
        for answer in (text, rf"\boxed{{{text}}}", f"#### {text}"):
            for gold in ("5", "{1, 2}", text[:300]):
                assert 0 <= verify.make(name).score(gold, answer) <= 1
    assert time.process_time() - began < 2


@given(
    st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join)), st.text(max_size=9)
)
@example("1/0", "1/0")
@example(r"\frac{1}{0}", "0")
@example("٣", "３")
def test_no_text_raises(text, other):
    for gold, answer in ((text, other), (other, text), (text, text)):
        for name in ("exact", "number", "marked", "boxed", "choice"):
            assert verify.make(name).score(gold, answer) in (0, 1)
        assert equivalence.equal(gold, answer) == equivalence.equal(answer, gold)
    assert equivalence.equal(text, text) == bool(equivalence._squeezed(equivalence._clean(text)))


@given(st.fractions(max_denominator=200), st.sampled_from(["{}", "${}$", "x = {}", "{} dollars", " {} ."]))
def test_numbers_are_equal_to_themselves_only(value, form):
    fraction = form.replace("{}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}")
    assert equivalence.equal(fraction, f"{value.numerator}/{value.denominator}")
    assert not equivalence.equal(fraction, f"{value.numerator + 1}/{value.denominator}")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("box", {}, "did you mean 'boxed'"),
        ("boxed", {"part": 1.0}, "config.verifier.part: unknown key"),
        ("boxed", {"partial": "x"}, "config.verifier.partial='x': expected float"),
        ("no_such_module:score", {}, "cannot be imported"),
        ("jaxcl.rl.verify:none", {}, "cannot be imported"),
        ("jaxcl.rl.verify:LETTERS", {}, "is no function"),
        ("os:getcwd", {}, "is called as function\\(gold, answer\\): too many positional arguments"),
    ],
)
def test_bad_verifiers(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        verify.make(name, **options)
    assert "\n" not in str(caught.value)


# Workers

HOSTILE = """
import os, signal, subprocess, sys, time

def score(gold, answer):
    print("noise"); sys.stdout.flush()
    if answer == "hang":
        while True: pass
    if answer == "sleep": time.sleep(1000)
    if answer == "child":
        place = os.path.join(os.path.dirname(__file__), "child")
        open(place, "w").write(str(subprocess.Popen(["sleep", "1000"]).pid)); time.sleep(1000)
    if answer == "die": os.kill(os.getpid(), signal.SIGKILL)
    if answer == "leave": os._exit(0)
    if answer == "quit": sys.exit(3)
    if answer == "segfault":
        import ctypes; ctypes.string_at(0)
    if answer == "eat": len([bytearray(1 << 24) for _ in range(100000)])
    if answer == "raise": raise RuntimeError("no\\nsuch")
    if answer == "nan": return float("nan")
    if answer == "text": return "many"
    if answer == "none": return None
    if answer == "read": return float(len(sys.stdin.read()))
    if answer == "pid": return float(os.getpid())
    if answer == "canary": return float("canary" in str(os.environ))
    if answer == "core":
        import resource; return float(sum(resource.getrlimit(resource.RLIMIT_CORE)))
    return float(gold == answer)
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    name = f"hostile_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return verify.make(f"{name}:score")


def alive(pid):
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid, seconds=5.0):
    """Whether a process ends soon: a signal is sent at once and takes its time."""
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_hostile_answers_cost_their_reward_only(hostile, tmp_path):
    answers = ["a", "hang", "die", "b", "eat", "raise", "leave", "child", "nan", "quit", "text", "none", "read", "a"]
    with Pool(hostile, workers=2, timeout=3.0, memory=256) as pool:
        verdicts = pool.rewards(["a"] * len(answers), answers)
        assert verdicts.rewards.tolist() == [float(answer == "a") for answer in answers]
        assert verdicts.rewards.dtype == np.float32
        assert verdicts.failed.dtype == bool
        assert verdicts.failed[[answers.index(x) for x in ("hang", "die", "eat", "raise", "nan")]].all()
        assert not verdicts.failed[[i for i, x in enumerate(answers) if x in "ab"]].any()
        assert verdicts.failed.sum() == sum(verdicts.events.values())
        assert verdicts.events == {"timeout": 2, "crash": 2, "memory": 1, "error": 4, "value": 1}
        assert verdicts.message
        assert "\n" not in verdicts.message
        child = int((tmp_path / "child").read_text())
        assert ends(child), "what the verifier started ends with it"
        assert pool.rewards(["a"], ["raise"]).message == "RuntimeError: no such"
        again = pool.rewards(["x", "y"], ["x", "z"])
        assert again.rewards.tolist() == [1, 0]
        assert sum(again.events.values()) == 0
        pids = [w.process.pid for w in pool._workers if w]
        assert all(map(alive, pids))
    assert pids
    assert not any(map(alive, pids)), "none is left"
    pool.close()
    with pytest.raises(UserError, match="closed"):
        pool.rewards(["a"], ["a"])


def test_a_worker_has_no_keys_and_leaves_no_core(hostile, monkeypatch):
    """A core would hold them, and texts of the training with them."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "OTHER"):
        monkeypatch.setenv(name, "canary")
    most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most[1], most[1]))
    with Pool(hostile, workers=1, timeout=20.0) as pool:
        verdicts = pool.rewards(["a"] * 3, ["canary", "core", "a"])
    resource.setrlimit(resource.RLIMIT_CORE, most)
    assert verdicts.rewards.tolist() == [0, 0, 1]
    assert not verdicts.failed.any()


def test_a_worker_killed_while_idle_costs_nothing(hostile):
    with Pool(hostile, workers=1, timeout=20.0) as pool:
        pid = pool._workers[0].process.pid
        os.kill(pid, signal.SIGKILL)
        pool._workers[0].process.wait()
        verdicts = pool.rewards(["a"], ["a"])
        assert verdicts.rewards.tolist() == [1]
        assert sum(verdicts.events.values()) == 0
        assert pool._workers[0].process.pid != pid


def test_order_does_not_depend_on_the_workers(hostile):
    golds = [str(i) for i in range(40)]
    answers = [str(i - i % 3) for i in range(40)]
    expected = [float(g == a) for g, a in zip(golds, answers, strict=True)]
    for workers in (1, 3):
        with Pool(hostile, workers=workers, timeout=20.0) as pool:
            assert pool.rewards(golds, answers).rewards.tolist() == expected
            pids = pool.rewards([""] * 9, ["pid"] * 9).rewards
            assert len(set(pids)) <= workers


def test_long_texts_pass_and_a_stopped_worker_is_replaced(hostile):
    long = "\ud83d\ude00\u2028 \ud800" * 100_000
    with Pool(hostile, workers=1, timeout=20.0) as pool:
        assert pool.rewards([long], [long]).rewards.tolist() == [1]
        pool.timeout = 0.5
        os.kill(pool._workers[0].process.pid, signal.SIGSTOP)  # reads nothing: the pipe is full
        assert pool.rewards([long], [long]).events["timeout"] == 1
        pool.timeout = 20.0
        assert pool.rewards(["b"], ["b"]).rewards.tolist() == [1]


def test_nothing_is_left_when_the_program_ends(hostile, tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from jaxcl.rl import verify; from jaxcl.rl.pool import Pool\n"
        f"pool = Pool(verify.make({hostile.place!r}), workers=1)\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "sys.exit('no close, no guard of __main__')\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip().isdigit(), run.stderr
    assert not alive(int(run.stdout))


def test_a_hanging_verifier_ends_after_the_program_was_killed(hostile, tmp_path):
    script = (
        f"import os, sys, threading; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from jaxcl.rl import verify; from jaxcl.rl.pool import Pool\n"
        f"pool = Pool(verify.make({hostile.place!r}), workers=1, timeout=1.0)\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()\n"
        "pool.rewards(['a'], ['hang'])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    deadline = time.monotonic() + 30
    while alive(int(run.stdout)):
        assert time.monotonic() < deadline, "it hangs for ever"
        time.sleep(0.1)


def test_cheap_verifiers_need_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with Pool(verify.make("tokens")) as pool:
        verdicts = pool.rewards([[1], [2], [3]], np.array([[1], [3], [3]]))
    assert verdicts.rewards.tolist() == [1, 0, 1]
    problems = tasks.make({"name": "mnns", "high": 5})
    with Pool(problems.verifier) as pool:
        golds = [problems.gold(i) for i in range(5)]
        assert pool.rewards(golds, golds).rewards.tolist() == [1] * 5
    with Pool(verify.Verifier("jaxcl.rl.verify:boxed", {"missing": 1}, True)) as pool:
        assert pool.rewards(["1"], ["1"]).events["error"] == 1, "one that raises costs its answer here too"


def test_a_verifier_that_cannot_be_loaded_is_said_at_once(hostile, tmp_path):
    Path(tmp_path / f"{hostile.place.split(':')[0]}.py").write_text("raise ImportError('broken')")
    with pytest.raises(UserError, match=r"ImportError: broken") as caught:
        Pool(hostile)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout": 0.0}, {"memory": -1}])
def test_bad_pools(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Pool(verify.make("tokens"), **options)


def test_verifiers_load_no_jax():
    script = "import sys, jaxcl.rl.worker; print([m for m in ('jax', 'numpy', 'sympy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


def test_math_verify_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'jaxcl\[rl\]'"):
        verify.make("math").score("1", r"\boxed{1}")


@pytest.mark.skipif(find_spec("math_verify") is not None, reason="it is installed")
def test_math_verify_missing_in_workers():
    with pytest.raises(UserError, match=r"pip install 'jaxcl\[rl\]'"):
        Pool(verify.make("math"))


def test_math_verify():
    pytest.importorskip("math_verify")
    verifier = verify.make("math", partial=0.1, scale=100.0)
    assert not verifier.cheap
    table = [
        ("1/2", r"\boxed{0.5}", 100),
        (r"\sqrt{8}", r"so \boxed{2\sqrt{2}}", 100),
        (r"$\{1, 2\}$", r"\boxed{\{2, 1\}}", 100),
        ("7", r"\boxed{8}", 10),
        ("7", "7", 0),
        ("1", r"\boxed{9^{9^{9^{9^9}}}}", None),
    ]
    with Pool(verifier, workers=1, timeout=8.0) as pool:
        verdicts = pool.rewards([gold for gold, _, _ in table], [answer for _, answer, _ in table])
    expected = [reward for _, _, reward in table]
    assert verdicts.rewards.tolist()[:-1] == pytest.approx(expected[:-1])
    assert verdicts.rewards[-1] < 100
