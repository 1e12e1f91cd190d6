"""The audit of dependencies: what is found fails, and what could not be asked is not called sound."""

import json
import tomllib

import pytest

from experiments.static import audit

SOUND = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}
EDITABLE = {"name": "jaxcl", "skip_reason": "distribution marked as editable"}


def answering(monkeypatch, **services):
    """Makes each service give an answer, or no sense at all."""

    class Run:
        stderr = "Traceback\nConnectionError: no such host\n"

        def __init__(self, text):
            self.stdout = text

    def run(command, **_):
        answer = services[command[-1].removeprefix("-s=")]
        return Run("" if answer is None else json.dumps({"dependencies": answer}))

    monkeypatch.setattr(audit.subprocess, "run", run)


@pytest.mark.parametrize(
    ("pypi", "osv", "status", "said"),
    [
        ([SOUND, EDITABLE], None, 0, "audited: 1 packages by pypi, 0 known vulnerabilities"),
        ([SOUND, FLAWED], None, 1, "b 2: X-1; mended in 3"),
        (None, [SOUND, UNKNOWN], 0, "not audited: 1 packages that osv does not know: c"),
        (None, None, 0, "NOT AUDITED for vulnerabilities: no advisory service answers here (pypi: ConnectionError"),
        (
            [UNKNOWN, UNKNOWN],
            None,
            0,
            "NOT AUDITED for vulnerabilities: no advisory service answers here (pypi: knows no",
        ),
    ],
)
def test_what_is_said_of_the_packages(monkeypatch, capsys, pypi, osv, status, said):
    answering(monkeypatch, pypi=pypi, osv=osv)
    assert audit.main() == status
    out = capsys.readouterr().out
    assert said in out
    assert out.startswith("audited:") == any(SOUND in (answer or []) for answer in (pypi, osv))


def test_dependencies_have_lower_bounds_and_licences_that_bind_nobody(monkeypatch):
    assert audit.faults(tomllib.loads(audit.PROJECT.read_text())["project"]) == []
    assert audit.faults({"dependencies": ["numpy"], "optional-dependencies": {"x": ["y==1"]}}) == [
        "numpy: has no lower bound",
        "y==1: has no lower bound",
    ]
    for words, bad in {
        "GPL-3.0-only": 1,
        "AGPL-3.0": 1,
        "GNU General Public License v3": 1,
        "LGPL-2.1": 0,
        "MIT": 0,
    }.items():
        assert bool(audit.COPYLEFT.search(words)) == bool(bad), words
    assert not audit.COPYLEFT.search("GNU Lesser General Public License v2 (LGPLv2)")
