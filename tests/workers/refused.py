"""Runs the command line once for every case, each in a fork: refused.py CASES.json, a dict name -> arguments.

Everything is imported once and no device is touched before the fork. Reports name -> [exit status, stderr, stdout].
"""

import json
import os
import pathlib
import sys
import tempfile
import traceback

import processes

from jaxcl import main, program, train  # noqa: F401  imported here once for all cases


def attempt(arguments: list[str], folder: pathlib.Path) -> list:
    """Returns what one command line does."""
    child = os.fork()
    if not child:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.argv = ["main", *arguments]
        code = 1
        try:
            processes.join()
            main.cli()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [status, (folder / "err").read_text(), (folder / "out").read_text()]


cases = json.loads(pathlib.Path(sys.argv[1]).read_text())
place = pathlib.Path(tempfile.mkdtemp(prefix="jaxcl-refused-"))
processes.report({name: attempt(arguments, place) for name, arguments in cases.items()})
