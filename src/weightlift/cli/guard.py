"""``weightlift guard -- COMMAND``: run any program and stop it before the machine suffers."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.cli.outcome import UsageError, write_error
from weightlift.errors import UnsupportedError
from weightlift.health.guard import words
from weightlift.health.guard.facts import Policy, WhenFull, default_reserve
from weightlift.health.guard.launch import ScopeWanted, choose_scope, find_group, start, with_readonly_mappings
from weightlift.health.guard.voice import Display, JsonLines, Lines, Panel, Silence
from weightlift.health.guard.watch import SIGNALS, Watch
from weightlift.host.groups import available_memory
from weightlift.host.processes import stay_alive
from weightlift.units import parse_bytes

if TYPE_CHECKING:
    from typing import IO

SUMMARY: str = "run a command, show which memory it takes, and stop it before the machine freezes"

NOT_FOUND: Final = 127
"""The exit code for a command that is not there, as shells have it."""

_USAGE: Final = "%(prog)s [options] -- COMMAND [ARGUMENT ...]"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.usage = _USAGE
    parser.add_argument("words", metavar="COMMAND", nargs=argparse.REMAINDER, help="the program and its arguments")
    parser.add_argument(
        "--limit", metavar="SIZE", help="most memory for the command (default: what is available without the reserve)"
    )
    parser.add_argument(
        "--reserve",
        metavar="SIZE",
        help="kept for everything else (default: a twentieth of the memory, from 64MiB to 2GiB)",
    )
    parser.add_argument("--swap", metavar="SIZE", default="0", help="most swap that the command may take (default: 0)")
    parser.add_argument(
        "--when-full",
        choices=[choice.value for choice in WhenFull],
        default=WhenFull.STOP.value,
        help="stop the command when there is no room left, or leave it frozen until there is (default: stop)",
    )
    parser.add_argument(
        "--grace", metavar="SECONDS", type=_seconds, default=5.0, help="from asking to end to killing (default: 5)"
    )
    parser.add_argument(
        "--readonly-mappings",
        action="store_true",
        help="Python programs: make checkpoints that torch maps read-only, so that GPU copies cannot turn them into "
        "anonymous memory; a program that changes such a tensor in place on the CPU crashes",
    )
    parser.add_argument(
        "--scope",
        choices=[choice.value for choice in ScopeWanted],
        default=ScopeWanted.AUTO.value,
        help="hold the command in a control group, or watch its process tree (default: auto, a group where possible)",
    )
    parser.add_argument(
        "--display",
        choices=["auto", "panel", "lines"],
        default="auto",
        help="a panel in the last rows of the terminal, or lines when something happens (default: auto)",
    )
    parser.add_argument("--log", metavar="FILE", type=Path, help="write JSON lines to a file, besides what is shown")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Start the command and watch it until it ends."""
    command = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not command:
        raise UsageError("there is no command to run", "usage: weightlift guard [options] -- COMMAND [ARGUMENT ...]")
    if sys.platform != "linux":
        raise UnsupportedError(f"guard needs Linux, this is {sys.platform}", hint="run it there, or in WSL2")
    if shutil.which(command[0]) is None:
        missing = FileNotFoundError(f"{command[0]}: no such program, or it may not be executed")
        write_error(missing, as_json=arguments.json, debug=False)
        return NOT_FOUND
    with contextlib.ExitStack() as stack:
        streams: list[IO[str]] = [sys.stderr] if arguments.json else []
        if arguments.log is not None:
            streams.append(stack.enter_context(arguments.log.open("w", encoding="utf-8")))
        return _watch(command, arguments, JsonLines(streams))


def _watch(command: list[str], arguments: argparse.Namespace, log: JsonLines) -> int:
    policy, limit_bytes = _rules(arguments)
    refused = stay_alive()
    scope = choose_scope(ScopeWanted(arguments.scope), limit_bytes, policy.swap_bytes)
    display = _display(arguments)
    environment = dict(os.environ)
    if arguments.readonly_mappings:
        environment = with_readonly_mappings(environment)
        display.say([f"{words.NAME}: {words.READONLY_WARNING}"])
    display.say([words.opening(command, scope.kind, scope.limit_bytes, policy.reserve_bytes)])
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    process_id = start(command, scope, environment, SIGNALS)
    find_group(scope, process_id)
    log.write(
        "start",
        command=command,
        process_id=process_id,
        scope=scope.kind,
        reason=scope.reason,
        folder=str(scope.group.level.folder) if scope.group else None,
        limit_bytes=scope.limit_bytes,
        reserve_bytes=policy.reserve_bytes,
        total_bytes=policy.total_bytes,
        refused=refused,
        readonly_mappings=arguments.readonly_mappings,
    )
    watch = Watch(process_id, command, scope, policy, display=display, log=log, readonly=arguments.readonly_mappings)
    return watch.run()


def _rules(arguments: argparse.Namespace) -> tuple[Policy, int]:
    """The policy, and the limit of the command's group in bytes."""
    machine = available_memory()
    if machine is None:
        raise UnsupportedError(
            "this machine does not tell how much memory it has (/proc/meminfo)",
            hint="the guard needs Linux with /proc mounted and readable",
        )
    reserve = default_reserve(machine.total_bytes)
    if arguments.reserve is not None:
        reserve = parse_bytes(arguments.reserve, option="--reserve")
    limit = max(machine.available_bytes - reserve, 0)
    if arguments.limit is not None:
        limit = parse_bytes(arguments.limit, option="--limit")
    policy = Policy(
        total_bytes=machine.total_bytes,
        reserve_bytes=reserve,
        swap_bytes=parse_bytes(arguments.swap, option="--swap"),
        when_full=WhenFull(arguments.when_full),
        grace_seconds=arguments.grace,
    )
    return policy, limit


def _display(arguments: argparse.Namespace) -> Display:
    if arguments.json:
        return Silence(sys.stderr)
    panel = arguments.display == "panel" or (arguments.display == "auto" and sys.stderr.isatty())
    return Panel(sys.stderr) if panel and sys.stderr.isatty() else Lines(sys.stderr)
