"""Fetches the real HIP runtime of Debian or Ubuntu into a folder, for tests that need no GPU.

The library loads without a GPU and names its errors, so the tests can compare weightlift's idea of the runtime with the
library and its header. Nothing is installed: the packages are downloaded by apt, which checks their signatures, and
unpacked below the folder. Where apt has no package lists, they are fetched into a folder of their own for the moment.

Prints the folder; a second call finds it complete and fetches nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER: Final = ROOT / ".cache" / "hip"
LIBRARY_PACKAGE: Final = "libamdhip64-5"
HEADER_PACKAGE: Final = "libamdhip64-dev"
LIBRARY: Final = "libamdhip64.so.5"
HEADER: Final = "usr/include/hip/hip_runtime_api.h"
TOOLS: Final = ("apt-get", "dpkg", "ldd")
SECONDS_MAX: Final = 300


class NotFetched(Exception):  # noqa: N818 - a state of the machine, told in a sentence
    """The runtime cannot be had here; the message says why."""


def run(*command: str, folder: Path) -> str:
    """Run a command in a folder and return what it printed.

    Raises:
        NotFetched: it failed, with the end of what it said.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        finished = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise NotFetched(f"{command[0]} took longer than {SECONDS_MAX} s") from err
    if finished.returncode:
        said = " ".join(finished.stderr.split())[-500:]
        raise NotFetched(f"{' '.join(command[:2])} failed with status {finished.returncode}: {said}")
    return finished.stdout


def apt_options(folder: Path) -> list[str]:
    """Options with which apt keeps its package lists in ``folder``, fetched into it now."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    options = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={folder / 'cache'}"]
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    run("apt-get", *options, *sandbox(), "update", "--quiet", folder=folder)
    return options


def sandbox() -> list[str]:
    """Root's apt downloads as another user, who may not write to a folder of root's; so it stays root."""
    return ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []


def needed_packages(options: list[str], folder: Path) -> list[str]:
    """The library's package and those of its needs that this machine lacks, as apt would install them."""
    plan = run("apt-get", *options, "--simulate", "--no-install-recommends", "install", LIBRARY_PACKAGE, folder=folder)
    return sorted({LIBRARY_PACKAGE, HEADER_PACKAGE, *re.findall(r"^Inst (\S+)", plan, re.MULTILINE)})


def download(folder: Path) -> list[Path]:
    """Download the packages into ``folder``, with the system's package lists or else with lists of its own."""
    options: list[str] = []
    try:
        packages = needed_packages(options, folder)
        run("apt-get", *sandbox(), "download", *packages, folder=folder)
    except NotFetched as err:
        print(f"with the system's package lists: {err}; trying fresh ones", file=sys.stderr)
        options = apt_options(folder)
        packages = needed_packages(options, folder)
        run("apt-get", *options, *sandbox(), "download", *packages, folder=folder)
    return sorted(folder.glob("*.deb"))


def library_folders(root: Path) -> list[str]:
    """Folders below ``root`` that hold shared libraries, for ``LD_LIBRARY_PATH``."""
    return sorted({str(path.parent) for path in root.rglob("*.so*")})


def check(root: Path) -> None:
    """Make sure that the library finds all it needs, and that its header is there.

    Raises:
        NotFetched: says what is missing.
    """
    found = sorted(root.rglob(LIBRARY))
    if not found or not (root / HEADER).exists():
        raise NotFetched(f"the packages lack {LIBRARY} or {HEADER}")
    path = ":".join(library_folders(root))
    needs = run("env", f"LD_LIBRARY_PATH={path}", "ldd", str(found[0]), folder=root)
    missing = re.findall(r"(\S+) => not found", needs)
    if missing:
        raise NotFetched(f"{LIBRARY} needs {', '.join(missing)}, which none of the packages has")


def fetch(target: Path) -> None:
    """Put the runtime into ``target``, which does not exist before and is complete afterwards.

    Raises:
        NotFetched: says why it cannot be had.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise NotFetched(f"this needs {', '.join(missing)}, the tools of Debian and Ubuntu")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        folder = Path(name)
        root = folder / "root"
        for package in download(folder):
            run("dpkg", "--extract", str(package), str(root), folder=folder)
        check(root)
        root.rename(target)


def main() -> int:
    """Print the folder; 1 with the reason on stderr if the runtime cannot be had."""
    parser = argparse.ArgumentParser(description="fetch the real HIP runtime for tests without a GPU")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="where to (default: .cache/hip)")
    target: Path = parser.parse_args().folder.absolute()
    try:
        if not target.exists():
            fetch(target)
        else:
            check(target)
    except (NotFetched, OSError) as err:
        hint = f" (delete {target} to fetch it again)" if target.exists() else ""
        print(f"the HIP runtime was not fetched: {err}{hint}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
