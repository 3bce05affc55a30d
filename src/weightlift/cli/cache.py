"""``weightlift cache status|warm|evict PATH``: what the page cache holds of any files, and changing it."""

from __future__ import annotations

import argparse
import contextlib
import enum
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from weightlift.cli.outcome import ExitCode, UsageError, write_json
from weightlift.health.cache.files import find_files
from weightlift.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from weightlift.health.cache.files import FoundFile

SUMMARY: str = "show what the page cache holds of files, fill it ahead of use, or empty it"

FILES_SHOWN: Final = 40


class CacheAction(enum.Enum):
    """What is to be done with the page cache."""

    STATUS = "status"
    WARM = "warm"
    EVICT = "evict"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.usage = "%(prog)s [options] status|warm|evict PATH [PATH ...]"
    parser.add_argument(
        "action",
        choices=[action.value for action in CacheAction],
        help="status: how much of each file is cached, and where; warm: read what is not cached; evict: drop the files "
        "from the cache and check that they are gone",
    )
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="files of any kind, or folders with all below them; links are followed"
    )
    parser.add_argument("--budget", metavar="SIZE", help="warm: most bytes to read (default: what memory has room for)")
    parser.add_argument(
        "--workers", metavar="N", type=int, help="warm: threads that read (default: found while reading)"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=int,
        default=FILES_SHOWN,
        help=f"most files shown, the largest; 0 for all (default: {FILES_SHOWN}; with --json always all)",
    )
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="warm: show progress on stderr; without this option only on a terminal and not with --json",
    )


def run(arguments: argparse.Namespace) -> int:
    """Find the files and do what was asked for."""
    action = CacheAction(arguments.action)
    if action is not CacheAction.WARM and (arguments.budget is not None or arguments.workers is not None):
        raise UsageError(
            f"--budget and --workers belong to warm, not to {action.value}", "usage: weightlift cache warm PATH"
        )
    files = find_files(arguments.paths)
    if action is CacheAction.STATUS:
        return _status(files, arguments)
    return _warm(files, arguments) if action is CacheAction.WARM else _evict(files, arguments)


def _status(files: Sequence[FoundFile], arguments: argparse.Namespace) -> int:
    from weightlift.health.cache.residency import residencies, total_cached

    entries = residencies(files)
    if arguments.json:
        _write(
            CacheAction.STATUS,
            {
                "files": [entry.to_json() for entry in entries],
                "bytes": sum(file.size_bytes for file in files),
                "cached_bytes": total_cached(entries),
            },
        )
        return ExitCode.DONE
    from weightlift.reports.cache import residency_table
    from weightlift.reports.console import show

    show(sys.stdout, residency_table(entries, limit=arguments.limit or None))
    return ExitCode.DONE


def _warm(files: Sequence[FoundFile], arguments: argparse.Namespace) -> int:
    from weightlift.health.cache.residency import total_cached
    from weightlift.health.cache.warm import warm

    budget = None if arguments.budget is None else parse_bytes(arguments.budget, option="--budget")
    begin = time.monotonic()
    with _progress(arguments) as progress:
        result = warm(files, budget_bytes=budget, workers=arguments.workers, progress=progress)
    seconds = time.monotonic() - begin
    code = ExitCode.DOES_NOT_FIT if result.bound == "memory" else ExitCode.DONE
    if arguments.json:
        cached = {"before_bytes": total_cached(result.before), "after_bytes": total_cached(result.after)}
        _write(CacheAction.WARM, result.to_json() | {"seconds": round(seconds, 3)} | cached)
        return code
    from weightlift.reports.cache import residency_table, warm_sentence
    from weightlift.reports.console import show, text

    show(sys.stdout, residency_table(result.after, limit=arguments.limit or None))
    show(sys.stderr, text(warm_sentence(result, seconds)))
    return code


def _evict(files: Sequence[FoundFile], arguments: argparse.Namespace) -> int:
    from weightlift.health.cache.evict import evict

    results = evict(files)
    code = ExitCode.DONE if all(result.gone for result in results) else ExitCode.FAILED
    if arguments.json:
        _write(CacheAction.EVICT, {"files": [result.to_json() for result in results]})
        return code
    from weightlift.reports.cache import eviction_table
    from weightlift.reports.console import show

    show(sys.stdout, eviction_table(results, limit=arguments.limit or None))
    return code


def _write(action: CacheAction, fields: Mapping[str, Any]) -> None:
    write_json({"schema": 1, "action": action.value, **fields})


def _progress(arguments: argparse.Namespace) -> AbstractContextManager[Callable[[int, int], None] | None]:
    on_terminal = sys.stderr.isatty()
    wanted = on_terminal and not arguments.json if arguments.progress is None else arguments.progress
    if not wanted:
        return contextlib.nullcontext()
    from weightlift.reports.progress import progress_bar, progress_lines

    return progress_bar(sys.stderr) if on_terminal else contextlib.nullcontext(progress_lines(sys.stderr))
