"""The self-test: the pipeline's checks on a real card, and one file to send back.

For cards that nobody here has, above all AMD's: an owner runs it and attaches the file. It holds what the machine is,
what every step said, and for a step that hung what the watchdog saw; no names of users, hosts or other files.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift._version import __version__
from weightlift.health.self_test_steps import STEPS, write_checkpoint
from weightlift.writing import write_failures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEP_SECONDS: Final = 120.0
"""How long a step may take before it counts as hung."""

_WORDS_KEPT: Final = 4000


def run_self_test(
    device: str, folder: Path | None, note: Callable[[str, dict[str, Any]], None], *, step_seconds: float = STEP_SECONDS
) -> dict[str, Any]:
    """Run every step, each in a process of its own.

    Args:
        device: the framework's name of the device.
        folder: where to put the checkpoint of about 100 MB, on the storage to be tried; a temporary folder if ``None``.
        note: called with the name and the result of each step.
        step_seconds: how long a step may take.

    Returns:
        One JSON object: ``schema``, what the machine is, and per step ``ok``, ``seconds`` and what it said.

    Raises:
        WriteError: there is no room for the checkpoint.
    """
    steps: dict[str, dict[str, Any]] = {}
    with _private_folder(folder) as place:
        with write_failures(place):
            write_checkpoint(Path(place))
        for step in STEPS:
            steps[step] = _run_step(step, device, place, step_seconds)
            note(step, steps[step])
            if step == "facts" and not steps[step]["ok"]:
                break
    return {
        "schema": 1,
        "weightlift": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "passed": all(result["ok"] for result in steps.values()),
        "steps": steps,
    }


@contextlib.contextmanager
def _private_folder(parent: Path | None) -> Iterator[str]:
    with write_failures(parent or tempfile.gettempdir()):
        folder = tempfile.TemporaryDirectory(prefix="weightlift-self-test-", dir=parent)
    with folder as place:
        yield place


def _run_step(step: str, device: str, place: str, step_seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "weightlift.health.self_test_steps", step, device, place]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=step_seconds, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as err:
        said = (err.stderr or b"").decode("utf-8", "replace") if isinstance(err.stderr, bytes) else err.stderr or ""
        return {"ok": False, "seconds": step_seconds, "error": "hung", "said": _last_words(said, place)}
    seconds = time.monotonic() - begin
    if done.returncode:
        words = _last_words(done.stderr, place)
        last = words.rsplit("\n", 1)[-1] or f"ended by signal {-done.returncode}"
        return {"ok": False, "seconds": seconds, "error": last, "said": words}
    return {"ok": True, "seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def _last_words(text: str, place: str) -> str:
    return text.strip()[-_WORDS_KEPT:].replace(place, "FOLDER").replace(str(Path.home()), "~")
