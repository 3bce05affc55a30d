"""Arguments that several commands share, and help that names defaults and environment variables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlift.errors import WeightliftError
from weightlift.options import ENVIRONMENT, LoadOptions
from weightlift.types import HeaderRules
from weightlift.units import format_bytes

if TYPE_CHECKING:
    import argparse


def add_path(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, and how its headers are judged."""
    parser.usage = "%(prog)s [options] PATH"
    parser.add_argument("path", metavar="PATH", help="a file, a folder of shards, an index file, or a cached model")
    parser.add_argument(
        "--header",
        choices=[rules.value for rules in HeaderRules],
        help=described("how headers are judged: as the reference parser does, or refusing all it tolerates", "header"),
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that opens a checkpoint and picks tensors from it."""
    add_path(parser)
    parser.add_argument(
        "--names",
        metavar="GLOB",
        action="append",
        help="only tensors of this name; * ? [] stand for others; may be given several times",
    )


def described(what: str, option: str, variable: str | None = None, *, otherwise: str | None = None) -> str:
    """Help that ends with the default and the environment variable of an option.

    Args:
        what: what the option does; taken from the table of environment variables where it is empty.
        option: the field of :class:`~weightlift.options.LoadOptions`.
        variable: the environment variable that sets it.
        otherwise: what happens where the field has no value.
    """
    assert variable is None or variable in ENVIRONMENT
    try:
        value: Any = getattr(LoadOptions(), option)
    except WeightliftError:
        # A bad environment variable is reported by the command that uses it; help has to work all the same.
        value = None
    if isinstance(value, int) and not isinstance(value, bool) and option.endswith("memory"):
        value = format_bytes(value).replace(" ", "")
    elif isinstance(value, float):
        value = f"{value:g}"
    default = otherwise if value is None else str(value)
    ends = [f"default: {default}"] if default else []
    ends += [f"environment: {variable}"] if variable else []
    text = what or (ENVIRONMENT[variable] if variable else "")
    return f"{text} ({'; '.join(ends)})".replace("%", "%%") if ends else text.replace("%", "%%")
