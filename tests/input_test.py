"""Bad input through the real command line: one line that names the field and the remedy, status 2, nothing written."""

import json
import re
import shutil

import processes
import pytest
import small

from jaxcl import folder as places
from jaxcl import train
from jaxcl.schema import UserError

# name -> words the line must hold: the field, the value or the remedy
SECTIONS = {
    "misspelt section": ({"evaluaton": {"every": 3}}, ["config.evaluaton", "did you mean 'evaluation'"]),
    "misspelt key": ({"packing": {"lenght": 32}}, ["config.packing.lenght", "did you mean 'length'"]),
    "words for a number of the loop": (
        {"checkpoint": {"every_steps": "abc"}},
        ["config.checkpoint.every_steps='abc'", "expected int"],
    ),
    "half a checkpoint": ({"checkpoint": {"keep": 1.5}}, ["config.checkpoint.keep=1.5", "expected int"]),
    "words for yes": (
        {"checkpoint": {"background": "maybe"}},
        ["config.checkpoint.background='maybe'", "expected bool"],
    ),
    "misspelt key of the loop": ({"checkpoint": {"every_step": 3}}, ["config.checkpoint.every_step", "'every_steps'"]),
    "wrong type": ({"microbatches": "two"}, ["config.microbatches='two'", "expected int"]),
    "wrong type in a section": ({"evaluation": {"every": "often"}}, ["config.evaluation.every='often'", "int"]),
    "no patience": ({"rollback": 0}, ["config.rollback=0", "at least 1"]),
    "not positive": ({"evaluation": {"every": 0}}, ["config.evaluation.every=0", "at least 1"]),
    "nothing to compare": (
        {"sources": {"d0": {"name": "text", "path": "any.txt"}}},
        ["config.evaluation.alignment=True", "names one alone", "set it to False"],
    ),
    "missing key": ({"packing": {}}, ["config.packing.length", "missing"]),
    "unknown model": ({"model": {"name": "transfomer"}}, ["config.model.name='transfomer'", "'transformer'"]),
    "unknown preset": ({"model": {"name": "transformer", "preset": "tinny"}}, ["config.model.preset", "'tiny'"]),
    "unknown method": ({"method": "reptil(every=3)"}, ["'reptil'", "did you mean 'reptile'"]),
    "unknown option of a method": ({"method": "er(capcity=3)"}, ["capcity", "did you mean 'capacity'"]),
    "method out of range": ({"method": "er(fraction=1.5)"}, ["fraction=1.5", "[0, 1)"]),
    "method that is no expression": ({"method": "er(; reptile"}, ["config.method=", "write it as"]),
    "unknown schedule": ({"schedule": {"name": "cosin", "peak": 0.1}}, ["config.schedule.name='cosin'", "cosine"]),
    "unknown optimiser": ({"optim": {"name": "adamm"}}, ["config.optim.name='adamm'", "did you mean 'adam"]),
    "learning rate in two places": ({"optim": {"name": "adamw", "lr": 0.1}}, ["config.optim.lr", "schedule.peak"]),
    "impossible mesh": ({"mesh": {"data": 3}}, ["config.mesh", "data=3", "number of devices, which is 1"]),
    "negative z-loss": ({"loss": {"z_loss": -1.0}}, ["config.loss.z_loss=-1.0", "not be negative"]),
    "negative decay": ({"optim__weight_decay": -1.0}, ["config.optim.weight_decay=-1.0", "at least 0"]),
    "momentum out of range": ({"optim__b2": 1.5}, ["config.optim.b2=1.5", "below 1"]),
    "no bytes": (
        {"sources__d1": {"name": "embedded", "domain": "code", "max_bytes": 0}},
        ["max_bytes=0", "at least 1"],
    ),
    "folder as a file": ({"sources__d1": {"name": "text", "path": "/usr"}}, ["path='/usr'", "is a folder", "/usr/*"]),
    "no microbatch": ({"microbatches": 0}, ["config.microbatches=0", "at least 1"]),
    "batch and microbatches": ({"microbatches": 3}, ["config.stream.batch=8", "multiple of 3"]),
    "no source": ({"sources": {}}, ["config.sources", "name at least one"]),
    "missing file": ({"sources__d1": {"name": "text", "path": "nowhere.txt"}}, ["nowhere.txt", "no such file"]),
    "unknown source in a stage": (
        {"stream__stages": [{"name": "a", "mixture": {"d7": 1.0}}]},
        ["config.stream.stages[0].mixture.d7", "no such source"],
    ),
    "steps of no stage": (
        {"stream__stages": [{"name": d, "steps": 2, "mixture": {d: 1.0}} for d in ("d0", "d1")]},
        ["config.stream.steps=8", "every stage has its own", "leave config.stream.steps out"],
    ),
    "adapter as a model": (
        {"model": {"name": "lora"}},
        ["config.model.name='lora'", "does not stand alone", "choose from cnn, mlp, patches, transformer"],
    ),
    "no stages": ({"stream__stages": []}, ["config.stream.stages", "at least one stage"]),
    "reservoir of no size": (
        {"stream__replay": {"fraction": 0.1, "over": "reservoir"}},
        ["config.stream.replay.capacity", "missing", "how many rows"],
    ),
    "vocabulary too small": (
        {"model": {"name": "transformer", "preset": "tiny", "vocab": 200}},
        ["config.model.vocab=200", "259", "set config.model.vocab="],
    ),
    "vocabulary too large": (
        {"model": {"name": "transformer", "preset": "tiny", "vocab": 32_000}},
        ["config.model.vocab=32000", "259", "set config.model.vocab="],
    ),
    "rows longer than the model": ({"packing__length": 1024}, ["1024", "512"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory):
    """The folder of a run that was stopped after ten steps, with a corpus of its own, and its settings."""
    place = tmp_path_factory.mktemp("begun")
    small.corpus(place / "text")
    settings = small.config(folder)
    for name, source in settings["sources"].items():
        source["path"] = str(place / "text" / f"{name}.txt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        small.strike(monkeypatch, "SIGTERM", 9)
        assert train.run(settings, str(place / "run")) == 0
    return place, settings


class Cases:
    """Collects command lines, with the folder that each names."""

    def __init__(self, place):
        self.place, self.lines, self.words, self.before = place, {}, {}, {}

    def add(self, name, words, settings, *arguments, workdir=None):
        """Adds a command; `settings` may be the text of a config file."""
        path = self.place / f"{len(self.lines)}.py"
        if isinstance(settings, str):
            path.write_text(settings)
        elif settings is not None:
            small.write(settings, path)
        workdir = workdir or self.place / f"{len(self.lines)}-run"
        self.lines[name] = [f"--config={path}", f"--workdir={workdir}", *arguments]
        self.words[name] = words
        self.before[name] = workdir, state_of(workdir)


def state_of(workdir):
    if workdir.is_dir():
        return small.tree_of(workdir)
    return workdir.read_bytes() if workdir.exists() else None


def add_command_lines(cases, settings):
    add = cases.add
    add("misspelt override", ["config.evaluaton", "evaluation"], settings, "--config.evaluaton.every=3")
    add(
        "override of the wrong type",
        ["config.stream.batch='many'", "expected int"],
        settings,
        "--config.stream.batch=many",
    )
    add("override of a default", ["config.stream.batch=8", "multiple of 3"], settings, "--config.microbatches=3")
    add("override that does not fit", ["config.stream.batch=0", "at least 1"], settings, "--config.stream.batch=0")
    add("misspelt flag", ["wrokdir"], settings, "--wrokdir=x")
    add("not a flag", ["'now'", "not a flag"], settings, "now")
    add("missing config file", ["command line", "No such file", "usage: "], None)
    add("config file with a syntax error", ["command line", "syntax", "line 1"], "def get_config(:\n    return\n")
    add(
        "config file with a wrong name",
        ["command line", "'ConfigDcit' is not defined"],
        "def get_config():\n    return ConfigDcit()\n",
    )
    add(
        "config file that refuses",
        ["error: data/: absent; fetch it"],
        "from jaxcl.schema import UserError\n\n\ndef get_config():\n    raise UserError('data/: absent; fetch it')\n",
    )
    add("config file without a config", ["command line", "get_config"], "x = 1\n")


def add_corpora(cases, folder, place):
    empty, short = place / "empty.txt", place / "short.txt"
    empty.write_text("\n\n")
    short.write_text("\n\n".join(f"word {i}" for i in range(10)))
    for name, path, words in (
        ("empty corpus", empty, ["config.sources", "no text", "check the path"]),
        ("task shorter than a batch", short, ["config.stream.stages[1]", "less than one batch of 8", "add text"]),
    ):
        cases.add(
            name, words, small.config(folder, sources__d1={"name": "text", "path": str(path), "split": "paragraph"})
        )
    binary = place / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    words = ["binary.txt", "not UTF-8", "convert the file"]
    cases.add("binary corpus", words, small.config(folder, sources__d1={"name": "text", "path": str(binary)}))
    for name, suffix in (("train", "array_record"), ("train.tokens", "npy"), ("manifest", "json")):
        cache = shutil.copytree(small.config(folder)["packing"]["directory"], place / f"cache {name}")
        for victim in cache.glob(f"d1-*/{name}*.{suffix}"):
            victim.write_bytes(victim.read_bytes()[:-7])
        words = [victim.name, f"delete {cache}/d1-", "rebuilt"]
        cases.add(f"damaged {name}", words, small.config(folder, packing__directory=str(cache)))


def add_folders(cases, begun, place):
    origin, settings = begun
    run = origin / "run"
    file = place / "file"
    file.write_text("mine")
    other = place / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    cases.add("workdir is a file", ["--workdir=", "is a file", "name a folder"], settings, workdir=file)
    cases.add("workdir below a file", ["file/run", "Not a directory", "another folder"], settings, workdir=file / "run")
    cases.add("workdir is no run", ["other", "not the folder of a run"], settings, workdir=other)
    words = ["--workdir=", "config.seed=3, not 4", "another --workdir"]
    cases.add("workdir of another config", words, {**settings, "seed": 4}, workdir=run)
    words = ["config.sources", "rows before step 10", "start a new --workdir"]
    past = json.loads(json.dumps(settings))
    past["stream"]["stages"][0]["steps"] = 5
    cases.add("edited past stage", words, past, workdir=run)
    torn = shutil.copytree(run, place / "torn")
    (torn / "run.json").write_text("{")
    cases.add("damaged run.json", ["run.json", "damaged"], settings, workdir=torn)
    half = shutil.copytree(run, place / "half")
    (half / "run.json").write_text('{"id": "x"}')
    cases.add("incomplete run.json", ["run.json", "damaged"], settings, workdir=half)
    moved = json.loads(json.dumps(settings))
    changed = origin / "text" / "d0.txt"
    words = ["config.sources", "held-out rows", "restore the corpus"]
    cases.add("changed corpus", words, moved, workdir=shutil.copytree(run, place / "moved"))
    changed.write_text(changed.read_text() + "\n\none more paragraph")  # its hash puts it among the held-out ones


@pytest.fixture(scope="module")
def attempts(folder, begun, tmp_path_factory):
    place = tmp_path_factory.mktemp("input")
    cases = Cases(place)
    for name, (overrides, words) in SECTIONS.items():
        cases.add(name, words, small.config(folder, **overrides))
    add_command_lines(cases, small.config(folder))
    add_corpora(cases, folder, place)
    add_folders(cases, begun, place)
    path = place / "cases.json"
    path.write_text(json.dumps(cases.lines))
    (found,) = processes.run("refused", path, env=small.environment(folder))
    return cases, found


NAMES = [
    *SECTIONS,
    *("misspelt override", "override of the wrong type", "override that does not fit", "misspelt flag", "not a flag"),
    "override of a default",
    *("missing config file", "config file with a syntax error", "config file with a wrong name"),
    "config file that refuses",
    *("config file without a config", "empty corpus", "task shorter than a batch", "binary corpus", "damaged train"),
    *(
        "damaged train.tokens",
        "damaged manifest",
        "workdir is a file",
        "workdir below a file",
        "workdir is no run",
        "workdir of another config",
    ),
    *("edited past stage", "damaged run.json", "incomplete run.json", "changed corpus"),
]


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_in_one_line(attempts, name):
    cases, found = attempts
    status, err, _ = found[name]
    lines = err.splitlines()
    assert (status, len(lines)) == (2, 1), err
    assert lines[0].startswith("error: ")
    for word in cases.words[name]:
        assert word in lines[0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written(attempts, name):
    cases, _ = attempts
    workdir, before = cases.before[name]
    assert state_of(workdir) == before


def test_all_cases_are_checked(attempts):
    assert set(NAMES) == set(attempts[1])


def test_a_row_damaged_after_the_start_ends_the_run_in_one_line(folder, tmp_path):
    cache = shutil.copytree(small.config(folder)["packing"]["directory"], tmp_path / "cache")
    for victim in cache.glob("d0-*/train-*.array_record"):
        whole = victim.read_bytes()
        victim.write_bytes(whole.replace(b"e\0\0\0", b"f\0\0\0"))  # tokens are bytes of text, four bytes each
        assert victim.read_bytes() != whole
    config = small.write(small.config(folder, packing__directory=str(cache)), tmp_path / "config.py")
    (started,) = processes.start(
        "run", "none", f"--config={config}", f"--workdir={tmp_path / 'run'}", env=small.environment(folder)
    )
    processes.finish([started], codes=(2,))
    (line,) = [line for line in started.log.read_text().splitlines() if line.startswith("error: ")]
    assert f"delete {cache}/d0-" in line
    assert "Traceback" not in started.log.read_text()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"seed": 0}, {"seed": 1}, "belongs to a run with config.seed=0, not 1; choose another --workdir"),
        ({}, {"seed": 1}, "belongs to a run with no config.seed, and this config has config.seed=1; choose"),
        ({"ema": {"rate": 0.5}}, {}, "a run with config.ema.rate=0.5, and this config has no config.ema.rate; choose"),
        (
            {"ema": None},
            {"ema": {"rate": 1, "of": 2}},
            "config.ema=None, and this config has more than one value in conf",
        ),
    ],
)
def test_a_folder_of_another_run_says_what_differs(tmp_path, old, new, words):
    old, new = {"method": "cpt", **old}, {"method": "cpt", **new}
    places.write(tmp_path / "run.json", {"id": "0", "finished": True, "config": old})
    assert places.finished(tmp_path, old)
    with pytest.raises(UserError, match=re.escape(words)):
        places.finished(tmp_path, new)
