"""What only a framework can tell, asked in a process of its own: versions, mappings, GPUs, the speed of their links.

Run as ``python -m weightlift.health.child FOLDER STEP…``. A driver that hangs takes this process with it and no other.
Every step says that it begins, then what it found, one JSON object a line, so that whoever waits knows what was found
before and what hung.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift.host.cgroup import read_text

if TYPE_CHECKING:
    from collections.abc import Callable

_MAPPED_BYTES: Final = 1 << 20


def _torch(_: str) -> dict[str, Any]:
    """Import torch and say what it was built for."""
    torch = importlib.import_module("torch")
    backend = "hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    return {"backend": backend, "backend_version": torch.version.hip or torch.version.cuda or ""}


def permissions(path: str | os.PathLike[str], maps: str) -> str:
    """Permissions of the first mapping of a file in a table like ``/proc/self/maps``; empty if there is none."""
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == os.fspath(path):
            return fields[1]
    return ""


def _maps() -> str:
    text = read_text(Path("/proc/self/maps"))
    if text is None:
        raise OSError("this system does not tell how files are mapped")
    return text


def _torch_mapping(folder: str) -> dict[str, Any]:
    """How ``torch.load(…, mmap=True)`` maps a checkpoint."""
    torch = importlib.import_module("torch")
    path = os.path.join(folder, "probe.pt")
    torch.save({"probe": torch.zeros(_MAPPED_BYTES, dtype=torch.uint8)}, path)
    state = torch.load(path, mmap=True, weights_only=True)
    maps = _maps()
    del state  # the mapping lives as long as this
    return {"mapping": permissions(path, maps)}


def _safetensors_mapping(folder: str) -> dict[str, Any]:
    """How ``safetensors.safe_open`` maps a checkpoint for torch."""
    library = importlib.import_module("safetensors")
    header = json.dumps({"probe": {"dtype": "U8", "shape": [_MAPPED_BYTES], "data_offsets": [0, _MAPPED_BYTES]}})
    text = header.encode() + b" " * (-len(header) % 8)
    path = os.path.join(folder, "probe.safetensors")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + bytes(_MAPPED_BYTES))
    with library.safe_open(path, framework="pt") as opened:
        tensor = opened.get_tensor("probe")
        maps = _maps()
        del tensor  # the mapping lives as long as this or the file
    return {"mapping": permissions(path, maps)}


def _gpus(_: str) -> dict[str, Any]:
    """What torch can use, and what its runtime says of it."""
    from weightlift.host.gpu import find_runtime
    from weightlift.options import from_environment

    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"gpus": []}
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        runtime = find_runtime("hip" if torch.version.hip else "cuda", from_environment("WEIGHTLIFT_GPU_RUNTIME"))
        found.append(
            {
                "name": f"cuda:{number}",
                "model": str(properties.name),
                "total_bytes": int(total),
                "free_bytes": int(free),
                "pci_address": "" if isinstance(runtime, str) else runtime.pci_bus_id(number),
                "architecture": str(getattr(properties, "gcnArchName", "")).split(":", 1)[0]
                if torch.version.hip
                else "",
                "integrated": bool(getattr(properties, "is_integrated", False)),
            }
        )
    return {"gpus": found}


def _links(_: str) -> dict[str, Any]:
    """How fast every GPU is filled from pinned memory, in GB/s."""
    from weightlift.health.probes import link_speed
    from weightlift.targets.access import gpu_access
    from weightlift.targets.frameworks import pick_framework
    from weightlift.types import Framework

    torch = importlib.import_module("torch")
    speeds: dict[str, float] = {}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        access = gpu_access(f"cuda:{number}", pick_framework(Framework.TORCH))
        if not isinstance(access, str):
            speeds[access.device] = link_speed(access)
    return {"links": speeds}


STEPS: Final[dict[str, Callable[[str], dict[str, Any]]]] = {
    "torch": _torch,
    "torch mapping": _torch_mapping,
    "safetensors mapping": _safetensors_mapping,
    "gpus": _gpus,
    "links": _links,
}
"""What can be asked; each step gets the folder for its files."""


def main(folder: str, steps: list[str]) -> None:
    """Carry out some steps; one that fails says so and the next begins."""
    for step in steps:
        _say({"step": step, "begins": True})
        try:
            answer = {"step": step, **STEPS[step](folder)}
        except Exception as err:  # noqa: BLE001 - whatever a framework raises is an answer
            answer = {"step": step, "error": f"{type(err).__name__}: {err}".splitlines()[0]}
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    # Frameworks take seconds to tidy up, or hang over it, and nothing here is worth tidying.
    os._exit(0)
