"""The command line itself: sections a file leaves out, configs that fail, commands that are interrupted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcl import bpe, console, main
from jaxcl.data import tokenizer
from jaxcl.models import transformer
from jaxcl.schema import UserError

ROOT = Path(__file__).parent.parent


def test_a_section_whose_keys_all_have_defaults_may_be_left_out_of_the_file():
    config = {"model": {"name": "mlp"}}
    main.override(config, "--config.mesh.fsdp=2")
    main.override(config, "--config.mesh.data=4")
    assert config == {"model": {"name": "mlp"}, "mesh": {"fsdp": 2, "data": 4}}
    with pytest.raises(UserError, match=r"config\.mehs: no such section"):
        main.override(config, "--config.mehs.data=4")


def test_what_an_override_gives_can_be_overridden_and_taken_back():
    config = {"stream": {}, "objective": "rloo"}
    main.override(config, "--config.stream.stages=({'name': 'a', 'learn': 'sft'}, {'name': 'b'})")
    main.override(config, "--config.stream.stages[0].learn=dpo")
    main.override(config, "--config.objective=None")
    assert config == {"stream": {"stages": [{"name": "a", "learn": "dpo"}, {"name": "b"}]}, "objective": None}
    main.override(config, "--config.objective=grpo(kl=0.1)")
    main.override(config, "--config.objective={'name': 'grpo', 'kl': 0.2}")
    assert config["objective"] == {"name": "grpo", "kl": 0.2}
    with pytest.raises(UserError, match=r"config\.stream\.stages\.2: no such section; choose from 0, 1"):
        main.override(config, "--config.stream.stages[2].learn=dpo")
    with pytest.raises(UserError, match=r"config\.stream\.stages\.0\.name\.x: no such section; before it stands 'a'"):
        main.override(config, "--config.stream.stages[0].name.x=1")


@pytest.mark.parametrize("old", ["cpt", {"name": "cpt"}, [{"name": "cpt"}]])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("er(capacity=4) + reptile", "er(capacity=4) + reptile"),
        ("{'name': 'er', 'capacity': 4}", {"name": "er", "capacity": 4}),
        ("[{'name': 'er'}, {'name': 'reptile'}]", [{"name": "er"}, {"name": "reptile"}]),
    ],
)
def test_a_method_may_be_a_text_a_dict_or_a_list_whatever_it_was(old, text, value):
    config = {"method": old, "label": "run 1"}
    main.override(config, f"--config.method={text}")
    assert config["method"] == value
    for label in ("7", "[]", "[7]", "(1, 2)"):
        main.override(config, f"--config.label={label}")
        assert config["label"] == label


@pytest.mark.parametrize(
    ("launcher", "arguments", "told"),
    [
        ("analytic", ["--mnist=nowhere", "--parts=pixels"], "mnist-0.npz: cannot be read"),
        ("hyperinterval", ["--mnist=nowhere", "--parts=task"], "--mnist=nowhere: is no folder; give the folder of the"),
        ("soft_rl", ["--config.model.wrong=1"], "config.model.wrong: unknown key"),
    ],
)
def test_launchers_find_their_configs_from_anywhere(launcher, arguments, told, tmp_path):
    """Their configs import each other; a terminal sets no path."""
    script = ROOT / "experiments" / launcher / "launch.py"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist-0.npz").touch()  # images that are there, of a kind: the config comes next
    command = [sys.executable, script, f"--workdir={tmp_path}", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "JAXCL"))}
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (run.returncode, run.stderr[:6]) == (2, "error:"), run.stderr
    assert told in run.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the loader of ml_collections
def test_a_config_that_fails_is_one_line_without_its_traceback(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(name):\n    raise ValueError(f'{name}: no such dataset')\n")
    with pytest.raises(UserError) as error:
        main.read(["x", f"--config={path}:imagenet"])
    text = str(error.value)
    assert text.startswith("command line: imagenet: no such dataset; ")
    assert "Traceback" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the loader of ml_collections
def test_an_address_is_no_folder(tmp_path):
    """As a path it would be a folder of that name on the disk of a machine that goes away."""
    path = tmp_path / "plain.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'label': 'x'})\n")
    with pytest.raises(UserError, match=r"--workdir=gs://bucket/run: a run is kept in a folder; mount the storage"):
        main.read(["x", f"--config={path}", "--workdir=gs://bucket/run"])
    assert main.read(["x", f"--config={path}", f"--workdir={tmp_path}"])[1] == str(tmp_path)


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (UserError("wrong; do otherwise"), 2, "error: wrong; do otherwise"),
        (OSError(28, "No space left on device", "out"), 2, "error: out: No space left on device; choose another"),
    ],
)
def test_small_commands_end_in_one_line(monkeypatch, capsys, fault, status, words):
    def command(argv):
        raise fault

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        console.cli(command)
    (line,) = capsys.readouterr().err.splitlines()
    assert (ended.value.code, line[: len(words)]) == (status, words)


def test_sizes_that_no_array_has_are_refused_before_any_is_made():
    with pytest.raises(UserError, match=r"vocab=10000000000000: must be at least 1 and below 2\^31"):
        transformer.make(preset="tiny", vocab=10**13)
    with pytest.raises(UserError, match=r"layers=1000000000000: must be"):
        transformer.make(preset="tiny", vocab=8, layers=10**12)
    with pytest.raises(UserError, match=r"--vocab=100000000000000000000: must be below 2\^31"):
        bpe.train(iter(["text"]), 10**20)


def test_half_a_character_does_not_end_the_training_of_a_tokenizer():
    assert tokenizer.without_surrogates("\ud800 a") == "� a"
    assert '"vocab"' in bpe.train(iter(["\ud800 some words, some words"]), 300)


SETS = [{"label": "a", "set": [("method", "er"), ("optim.lr", 1)]}, {"label": "b", "set": [("method", "cpt")]}]


@pytest.mark.parametrize("key", ["method", "method.gamma", "method[0]"])
def test_an_option_that_every_variant_sets_is_refused(key):
    """It would change nothing, and a result would be told to come from it."""
    with pytest.raises(UserError, match=r"would change nothing, every variant of this file sets config.method"):
        main.heard({"variants": SETS}, f"--config.{key}=3")
    main.heard({"variants": SETS}, "--config.optim.lr=3")  # of some variants
    main.heard({"variants": SETS}, "--config.methods=3")
    main.heard({"method": "er"}, f"--config.{key}=3")


def test_the_command_line_of_a_comparison_refuses_it(tmp_path):
    """And says so before anything is made."""
    argv = ["--config=configs/analytic.py:compare", "--config.method=acil(gamma=3)", f"--workdir={tmp_path / 'w'}"]
    command = [sys.executable, "-m", "jaxcl.main", *argv]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr.startswith("error: --config.method: would change nothing")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()
