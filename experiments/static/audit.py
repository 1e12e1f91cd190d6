"""Known vulnerabilities of what is installed, and what pyproject.toml says of it: python -m experiments.static.audit

pip-audit asks an advisory service about every package. Where none can be reached, or it does not know the packages,
that is said on one line and is no failure; it is no success either. Status 1: a vulnerability, or a fault of pyproject.
"""

import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"
SERVICES = ("pypi", "osv")
COPYLEFT = re.compile(r"(?<!L)(?<!Lesser )\bA?GPL|(?<!Lesser )General Public License")


def ask(service, command=("-m", "pip_audit")):
    """Returns what pip-audit found by asking one service, or why it found nothing."""
    options = ["--format=json", "--progress-spinner=off", "--skip-editable", "--timeout=15", f"-s={service}"]
    run = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True, check=False)
    try:
        return json.loads(run.stdout)["dependencies"], ""
    except (ValueError, KeyError):
        return [], (run.stderr.strip().splitlines() or ["no answer"])[-1][:160]


def vulnerabilities(answers):
    """Returns (audited, not audited, lines of vulnerabilities) of the packages that a service was asked about."""
    asked = [one for one in answers if one.get("skip_reason") != "distribution marked as editable"]
    known = [one for one in asked if "skip_reason" not in one]
    found = []
    for one in known:
        for flaw in one["vulns"]:
            mended = f"; mended in {', '.join(flaw['fix_versions'])}" if flaw["fix_versions"] else ""
            found.append(f"{one['name']} {one['version']}: {flaw['id']}{mended}")
    return len(known), [one["name"] for one in asked if "skip_reason" in one], found


def faults(project):
    """Returns what is wrong with dependencies: no lower bound, or a licence that would bind users."""
    direct, extras = project["dependencies"], project.get("optional-dependencies", {})
    found = [f"{one}: has no lower bound" for one in itertools.chain(direct, *extras.values()) if ">=" not in one]
    for one in direct:
        name = re.split(r"[\[><=!~ ]", one)[0]
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed: nothing to look at
        kinds = [about.get("License-Expression") or "", *(about.get_all("Classifier") or [])]
        if licence := [kind for kind in kinds if COPYLEFT.search(kind)]:
            found.append(f"{name}: {licence[0]}")
    return found


def main():
    """Prints what was found and returns the exit status."""
    bad = faults(tomllib.loads(PROJECT.read_text())["project"])
    reasons = []
    for service in SERVICES:
        answers, reason = ask(service)
        audited, left, found = vulnerabilities(answers)
        if audited:
            print(f"audited: {audited} packages by {service}, {len(found)} known vulnerabilities")
            print("\n".join(found), end="\n" * bool(found))
            if left:
                print(f"not audited: {len(left)} packages that {service} does not know: {', '.join(left[:8])} ...")
            bad += found
            break
        reasons.append(f"{service}: {reason or f'knows none of {len(left)} packages'}")
    else:
        print(f"NOT AUDITED for vulnerabilities: no advisory service answers here ({'; '.join(reasons)})")
    print("\n".join(bad) if bad else "dependencies: each has a lower bound, and no direct one a copyleft licence")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
