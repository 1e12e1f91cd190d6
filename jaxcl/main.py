"""The command line: flags -> config -> training, or a sweep of it."""

from __future__ import annotations

import os
import re
import sys
from ast import literal_eval
from collections.abc import Callable, Mapping
from logging import LogRecord
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_dict, config_flags

from jaxcl import schema
from jaxcl.schema import UserError

USAGE = "usage: python -m jaxcl.main --config=FILE --workdir=FOLDER [--config.KEY=VALUE ...]"
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config(), e.g. configs/quickstart.py.",
    sys_argv=[""],  # overrides are applied by `read`: the flag would refuse keys that the file leaves at their default
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run that is found there continues.")


SECTIONS = (
    "mesh",
    "loss",
    "evaluation",
    "checkpoint",
    "watch",
)  # that a file may leave out: all of their keys have defaults


def plain(value: Any) -> Any:
    """Returns `value` with every ConfigDict turned into a dict, and every tuple into a list."""
    if isinstance(value, (config_dict.ConfigDict, Mapping)):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read(argv: list[str], usage: str = USAGE) -> tuple[dict[str, Any], str]:
    """Returns config and workdir of a command line; `usage` is what messages end with.

    Raises:
      UserError: whatever is wrong with it, in one line.
    """
    given = [arg for arg in argv if re.match(r"--?config\.", arg)]
    find_neighbours(argv)
    try:
        rest = flags.FLAGS([arg for arg in argv if arg not in given])[1:]
        config = CONFIG.value
        getattr(config, "keys", None)  # a file that could not be read shows itself only here
    except UserError:
        raise
    except Exception as error:  # a config file is a program: it can fail in any way
        last = str(error).strip().rsplit("\n", 1)[-1]  # absl puts a traceback before what a config file says
        text = " ".join(last.removeprefix("ValueError: ").split()) or type(error).__name__
        raise UserError(f"command line: {text}; {usage}") from error
    if rest:
        raise UserError(f"command line: {rest[0]!r} is not a flag; options are written --config.KEY=VALUE")
    if config is None:
        raise UserError(f"--config: missing; {usage}")
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(f"--config: get_config() must return a ConfigDict, not {type(config).__name__}")
    if WORKDIR.value == "":
        raise UserError("--workdir=: is empty; name the folder of the run")
    if WORKDIR.value and "://" in WORKDIR.value:
        raise UserError(f"--workdir={WORKDIR.value}: a run is kept in a folder; mount the storage and name that folder")
    whole = plain(config)
    for arg in given:
        override(whole, arg)
        heard(whole, arg)
    return whole, WORKDIR.value or f"runs/{whole.get('label', 'run')}"


def parse(argv: list[str], usage: str) -> None:
    """Reads the flags of a launcher, before its configs.

    Raises:
      UserError: an unknown flag, or a value that it does not take.
    """
    try:
        flags.FLAGS([arg for arg in argv if not re.match(r"--?config\.", arg)])
    except flags.Error as error:
        raise UserError(f"command line: {' '.join(str(error).split())}; {usage}") from error


def find_neighbours(argv: list[str]) -> None:
    """Lets a config file import others beside it, as in `from configs import quickstart`, from any folder."""
    for i, arg in enumerate(argv):
        if match := re.fullmatch(r"--?config(=(.*))?", arg):
            path, dot, _ = (match[2] if match[1] else "".join(argv[i + 1 : i + 2])).partition(".py")
            root = str(Path(path).resolve().parent.parent)
            if dot and root not in sys.path:
                sys.path.append(root)


def override(config: dict[str, Any], arg: str) -> None:
    """Applies `--config.a.b[0].c=value`; the key may be one that the file leaves at its default.

    Raises:
      UserError: no value, or no such section. Names and types are checked where the section is used.
    """
    key, equals, text = arg.split("config.", 1)[1].partition("=")
    if not equals:
        raise UserError(f"--config.{key}: write a value, as in --config.{key}=VALUE")
    try:
        value = (
            {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else literal_eval(text)
        )
    except (SyntaxError, ValueError):
        value = text  # plain words need no quotes
    section = key.split(".")[0]
    if section in SECTIONS and section != key and config.get(section) is None:
        config[section] = {}
    schema.assign(config, key, plain(value), text)


def heard(config: Mapping[str, Any], arg: str) -> None:
    """Raises UserError for an override of what every variant of a comparison sets itself: it would change nothing."""
    key = arg.split("config.", 1)[1].partition("=")[0]
    above = [key[: match.start()] for match in re.finditer(r"[.\[]", key)] + [key]
    sets = [
        {str(pair[0]) for pair in variant.get("set", ())} if isinstance(variant, Mapping) else set()
        for variant in config.get("variants") or ()
    ]
    if sets and (same := next((name for name in above if all(name in one for one in sets)), None)):
        raise UserError(
            f"--config.{key}: would change nothing, every variant of this file sets config.{same}; edit its variants"
        )


def main(argv: list[str]) -> int:
    """Runs what the command line asks for and returns the exit status."""
    config, workdir = read(argv)
    # After the flags: a mistake in them should not cost an import of jax.
    from jaxcl import distributed, sweep, train  # noqa: PLC0415

    distributed.cache_compilations()
    return (sweep.run if "variants" in config else train.run)(config, workdir)


def unsaid(record: LogRecord) -> bool:
    """Returns whether a log record is to be shown: not what a thread of Orbax raises, which is said when it is met."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def cli(run: Callable[[list[str]], int] = main) -> None:
    """Entry point: user errors are one line and status 2, Ctrl-C is status 130; neither prints a traceback."""
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        print(f"{USAGE}\n\n{flags.FLAGS.get_help()}")
        sys.exit(0)
    logging.set_verbosity(logging.ERROR)
    logging.get_absl_logger().addFilter(unsaid)
    try:
        sys.exit(run(sys.argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = error.filename or "a file of the run"
        print(f"error: {where}: {error.strerror}; mend that or choose another folder", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli()
