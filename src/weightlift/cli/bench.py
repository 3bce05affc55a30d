"""``weightlift bench``: how fast a model loads on this machine, along every path and by other loaders."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from weightlift.bench.contestants import PATHS, PEERS
from weightlift.bench.options import ROUNDS, ROUNDS_OF_A_RESULT, BenchOptions
from weightlift.cli.arguments import add_checkpoint, described
from weightlift.cli.outcome import ExitCode, write_json
from weightlift.cli.reading import add_progress
from weightlift.errors import OptionError
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from weightlift.bench.results import BenchResult
    from weightlift.bench.rounds import Step

SUMMARY: str = "measure how fast a model loads on this machine, along every path, beside what the machine could do"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_checkpoint(parser)
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="where tensors go: cpu, null (read and discard) or cuda:N (default: the first GPU that torch can use, "
        "else cpu, or null where neither torch nor numpy is installed)",
    )
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=int,
        default=ROUNDS,
        help=f"how often everything is run, each time in a fresh process (default: {ROUNDS}; below "
        f"{ROUNDS_OF_A_RESULT} nothing is called a result)",
    )
    parser.add_argument(
        "--paths",
        metavar="LIST",
        default=",".join(PATHS),
        help=f"which paths, with commas between them (default: {','.join(PATHS)})",
    )
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help=described("the host-memory budget of weightlift's own loads", "host_memory"),
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        action="append",
        help="other loaders to measure beside it, with commas or given several times: all for those that are "
        f"installed, or any of {', '.join(peer.name for peer in PEERS)}",
    )
    parser.add_argument(
        "--no-cold",
        action="store_true",
        help="never drop the files from the page cache, and so measure warm loads alone",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the result, as .svg or (with the package Pillow) as .png")
    add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, then print what was found; an interrupt prints what there is."""
    from weightlift.bench.running import run_bench
    from weightlift.health.gathering import gather

    options = BenchOptions(
        device=arguments.device,
        rounds=arguments.rounds,
        paths=_words([arguments.paths]),
        names=arguments.names,
        host_memory=arguments.host_memory,
        against=_words(arguments.against or ()),
        cold=not arguments.no_cold,
        header=arguments.header or HeaderRules.REFERENCE,
    )
    with _plotted(arguments.plot) as plot:
        with _progress(arguments) as progress:
            result = run_bench(
                arguments.path, options, gather=lambda path: gather(path, measure=False), progress=progress
            )
        plot(result)
    if arguments.json:
        write_json(result.to_json())
    else:
        from weightlift.reports.bench import bench_tables
        from weightlift.reports.console import show

        show(sys.stdout, *bench_tables(result))
    if result.partial:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


def _words(values: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    words = (word.strip() for value in values for word in value.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def _progress(arguments: argparse.Namespace) -> AbstractContextManager[Callable[[Step], None]]:
    on_terminal = sys.stderr.isatty()
    wanted = on_terminal and not arguments.json if arguments.progress is None else arguments.progress
    if not wanted:
        return contextlib.nullcontext(lambda _: None)
    from weightlift.reports.progress import step_bar, step_lines

    return step_bar(sys.stderr) if on_terminal else contextlib.nullcontext(step_lines(sys.stderr))


@contextlib.contextmanager
def _plotted(name: str | None) -> Iterator[Callable[[BenchResult], None]]:
    """What draws the result; whether that can be done is found out first, so that a benchmark is not in vain.

    Raises:
        OptionError: the name says neither SVG nor PNG.
        MissingExtraError: a PNG is wanted and Pillow is not installed.
        OSError: the file cannot be written.
    """
    if name is None:
        yield lambda _: None
        return
    kind = os.path.splitext(name)[1].lower()
    if kind not in {".svg", ".png"}:
        raise OptionError(f"plot={name!r} is neither .svg nor .png", hint="name a file that ends in .svg or .png")
    from weightlift.reports.bench_chart import bench_picture
    from weightlift.reports.drawing import as_svg, require_png, write_png

    if kind == ".png":
        require_png()
    new = not os.path.exists(name)
    open(name, "ab").close()
    written = False

    def draw(result: BenchResult) -> None:
        nonlocal written
        picture = bench_picture(result)
        if kind == ".png":
            write_png(picture, name)
        else:
            with open(name, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(as_svg(picture))
        written = True

    try:
        yield draw
    finally:
        if new and not written:
            os.unlink(name)
