"""What the small commands share: arguments that complain in one line, and exit codes without tracebacks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxcl.schema import UserError


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"command line: {message}; see {self.prog} --help")


def cli(main: Callable[[list[str]], None]) -> None:
    """Runs a command: user errors and files that cannot be written are one line and status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of what is printed, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        sys.exit(0)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = error.filename or "a file"
        print(f"error: {where}: {error.strerror}; choose another folder", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
