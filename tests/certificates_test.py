"""What a run says of its promises: kept, broken, or never made; in the report, on the terminal and as exit code."""

import io

import pytest
from rich.console import Console

from jaxcl.certify import __main__ as command
from jaxcl.report import certificates, terminal

TASKS, DOMAINS = ["first", "second", "third"], ["a", "b", "c"]


def entry(task, over, deployed, promised, **rest):
    """Returns what is certified of a domain at one time, see `jaxcl.certify.make`."""
    sizes = {"radius": 0.4, "affine_radius": 0.1, "kept_radius": 0.1, "clipped": 0.25}
    shares = {"interval": 0.1, "affine": 0.2, "joint": 0.3 if over else None}
    return {"task": task, "over": over, "deployed": deployed, "promised": promised} | shares | sizes | rest


def records(last=0.9, second=0.7):
    """Returns records of a run of three tasks, two of which are over; `last` is the accuracy of the first at its end.

    Before training nothing is over; what was promised is what the first record says in which a task is.
    """
    unlearned = [entry(t, False, 0.5, None) for t in range(3)]
    after = [entry(0, True, 0.95, 0.8), *unlearned[1:]]
    sizes = {"kept_radius": 0.05, "interval": 0.0, "affine": 0.6, "joint": 0.7, "guessed": 0.4}
    end = [entry(0, True, last, 0.85, **sizes), entry(1, True, 0.75, second, guessed=0.6), unlearned[2]]
    return {-1: dict(zip(DOMAINS, unlearned, strict=True)), 0: dict(zip(DOMAINS, after, strict=True))} | {
        1: dict(zip(DOMAINS, end, strict=True))
    }


def compared(**options):
    return certificates.compared(TASKS, DOMAINS, records(**options))


def text(block):
    """Returns the section of the report, and the table on a terminal."""
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(terminal.promises(block))
    return certificates.section({"certificates": block}), console.export_text()


def test_a_promise_is_that_of_the_time_when_a_task_was_learned():
    block = compared()
    first, second = block["tasks"]  # the third is not over
    assert (first["task"], first["domain"]) == ("first", "a")
    assert (first["promised"], first["just_after"], first["deployed"], first["now"]) == (0.8, 0.95, 0.9, 0.85)
    assert (first["interval"], first["affine"], first["joint"]) == (0.1, 0.2, 0.3)
    assert (first["interval_now"], first["affine_now"], first["joint_now"]) == (0.0, 0.6, 0.7)
    assert (first["kept_radius"], first["clipped"], first["guessed"]) == (0.1, 0.25, 0.4)
    assert (second["promised"], second["deployed"], second["kept"]) == (0.7, 0.75, True)
    assert block["kept"]
    assert block["promised"] == pytest.approx(0.75)
    assert block["deployed"] == pytest.approx(0.825)
    assert block["guessed"] == pytest.approx(0.5)
    section, table = text(block)
    assert "Every promise is kept" in section
    assert "Without being told the task: 50.0 % right" in section
    assert table.split()[5:11] == ["first", "80.0", "%", "90.0", "%", "yes"]
    assert "NO" not in table


@pytest.mark.parametrize(("last", "kept"), [(0.8, True), (0.799, False)])
def test_a_task_below_its_promise_breaks_it(last, kept):
    """Equal is kept; one that is broken is not made up for by one that is kept."""
    block = compared(last=last)
    assert [one["kept"] for one in block["tasks"]] == [kept, True]
    assert block["kept"] is kept
    section, table = text(block)
    assert ("A promise is broken" in section) != kept
    assert ("Every promise is kept" in section) == kept
    assert ("NO" in table) != kept


def test_nothing_is_guaranteed_unless_every_task_was_promised_something():
    block = compared(second=None)
    assert [one["kept"] for one in block["tasks"]] == [True, None]
    assert block["kept"] is None
    assert block["promised"] is None
    assert "Nothing is guaranteed" in text(block)[0]
    start = certificates.compared(TASKS, DOMAINS, {-1: records()[-1]})
    assert start["tasks"] == []
    assert start["kept"] is None
    assert certificates.section({"certificates": start}) == ""


@pytest.mark.parametrize(("last", "code"), [(0.9, None), (0.7, 1)])
def test_the_command_fails_if_a_promise_is_broken(monkeypatch, capsys, last, code):
    asked = []
    block = compared(last=last) | {"stages": 3}
    monkeypatch.setattr(command, "check", lambda path, step: asked.append((str(path), step)) or block)
    if code is None:
        command.main(["runs/one", "--step=7"])
    else:
        with pytest.raises(SystemExit) as end:
            command.main(["runs/one", "--step=7"])
        assert end.value.code == code
    told = capsys.readouterr()
    assert asked == [("runs/one", 7)]
    assert ("a promise is broken" in told.err) == (code == 1)
    assert "first" in told.out
    assert "2 of 3 tasks are over; the others are promised nothing yet" in told.out
    assert "nothing could be promised" not in told.out


def test_a_promise_of_nothing_is_not_praised(monkeypatch, capsys):
    block = compared(second=0.0)
    assert block["kept"]
    assert "But nothing could be promised of second: no row was certified" in text(block)[0]
    monkeypatch.setattr(command, "check", lambda path, step: block | {"stages": 2})
    command.main(["runs/one"])
    assert "nothing could be promised of second: no row was certified" in capsys.readouterr().out
