"""The command line: flags -> config -> training, or a sweep of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from jaxcl.schema import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(), e.g. configs/quickstart.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run that is found there continues.")


def plain(value: Any) -> Any:
    """Returns `value` with every ConfigDict turned into a dict."""
    if isinstance(value, (config_dict.ConfigDict, Mapping)):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def parse(argv: list[str]) -> list[str]:
    """Parses the command line; every complaint is a UserError of one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"command line: {text}; see python -m jaxcl.main --help") from error


def main(argv: list[str]) -> int:
    """Runs what the command line asks for and returns the exit status."""
    rest = parse(argv)[1:]
    if rest:
        raise UserError(f"command line: {rest[0]!r} is not a flag; options are written --config.NAME=VALUE")
    if CONFIG.value is None:
        raise UserError("--config: missing; give it a file, e.g. --config=configs/quickstart.py")
    logging.set_verbosity(logging.ERROR)
    config = plain(CONFIG.value)
    name = CONFIG.value.get("label") or "run"
    from jaxcl import sweep, train  # after the flags: an error in them costs no import of jax

    run = sweep.run if "variants" in config else train.run
    return run(config, WORKDIR.value or f"runs/{name}")


def cli() -> None:
    """Entry point of `python -m jaxcl.main`: user errors are one line and status 2."""
    if any(flag in sys.argv[1:] for flag in ("--help", "-help", "--helpshort", "--helpfull")):
        app.run(main)
    try:
        sys.exit(main(sys.argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
