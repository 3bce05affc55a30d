"""Which path to load by on this machine, in words for the owner of a desktop, and what to tell other programs.

Takes facts and nothing else. ``auto`` decides per file and does well everywhere; what is recommended here is what it
cannot know (that the machine should stay usable meanwhile, that the same model is loaded often) and what other loaders
need to be told.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.host.mounts import FileSystemClass
from weightlift.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.health.facts import Facts

_SPARE: Final = 0.8
"""Part of the available memory that a model's files may take in the page cache."""

_UNIFIED_SHARE: Final = 1 / 3
_SLOW: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolAdvice:
    """What to tell another program on this machine.

    Attributes:
        tool: the program.
        option: the exact option, or what to do without one.
        why: in a sentence.
    """

    tool: str
    option: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """How to load on this machine.

    Attributes:
        method: the value for ``--method``.
        cache: the value for ``--cache``.
        device: the value for ``--device``.
        command: the whole command.
        reasons: why, a sentence each.
        tools: what to tell other programs.
    """

    method: str
    cache: str
    device: str
    command: str
    reasons: tuple[str, ...]
    tools: tuple[ToolAdvice, ...]


def recommend(facts: Facts) -> Recommendation:
    """What to do on this machine.

    Args:
        facts: the machine, and the place of the model if one was named.
    """
    method, cache, reasons = _path(facts)
    device = "cuda:0" if facts.has_gpu and facts.software.gpus != () else "cpu"
    path = shlex.quote(facts.place.path) if facts.place else "PATH"
    command = f"weightlift load {path} --device {device} --method {method} --cache {cache}"
    return Recommendation(
        method=method,
        cache=cache,
        device=device,
        command=command,
        reasons=(*reasons, *_more_reasons(facts)),
        tools=tuple(_tools(facts, direct=method == "direct")),
    )


def _available(facts: Facts) -> int | None:
    room = facts.machine.room if facts.machine else None
    return room.available_bytes if room else None


def _crowds(facts: Facts) -> bool | None:
    """Whether the model's files would crowd the page cache; without a model, one that fills the GPUs is assumed."""
    available = _available(facts)
    size = facts.place.model_bytes if facts.place else facts.gpu_bytes
    if available is None or not size:
        return None
    share = _UNIFIED_SHARE if facts.unified else _SPARE
    return size > share * available


def _path(facts: Facts) -> tuple[str, str, list[str]]:
    """Method, cache and the reasons for them."""
    kind = _file_system(facts)
    available = _available(facts)
    crowds = _crowds(facts)
    keep = "drop" if crowds else "keep"
    if kind in {FileSystemClass.PLAN9, FileSystemClass.FUSE} or _over_network(facts):
        names = {FileSystemClass.PLAN9: "a drive of another system", FileSystemClass.FUSE: "another program"}
        source = "the network" if _over_network(facts) else names[kind]
        stay = "and are not kept, since they would crowd your memory" if crowds else "and stay there for the next load"
        return "buffered", keep, [f"the files come through {source}, so they are read with plain buffered reads {stay}"]
    if crowds and available is not None:
        size = facts.place.model_bytes if facts.place else facts.gpu_bytes
        what = f"{'the model' if facts.place else 'a model that fills your GPUs'} ({format_bytes(size)})"
        free = f"the {format_bytes(available)} of memory that are free"
        if facts.unified:
            reason = f"CPU and GPU share one memory here: {what} takes so much of {free} that its cached files would "
            reason += "take room from it, so they are read past the page cache"
        else:
            reason = f"{what} does not fit beside your programs into {free}: it is read past the page cache, so that "
            reason += "nothing else is pushed out"
        return (*_past_the_cache(facts), [reason])
    if crowds is None:
        return "auto", "auto", ["auto chooses per file from what is cached, what the drive takes and what is free"]
    return (
        "auto",
        "keep",
        ["the files fit into free memory: the first load reads the drive, the next ones come out of memory"],
    )


def _past_the_cache(facts: Facts) -> tuple[str, str]:
    refused = facts.place is not None and facts.place.direct is not None and not facts.place.direct.supported
    return ("buffered" if refused else "direct"), "drop"


def _file_system(facts: Facts) -> FileSystemClass:
    mount = facts.place.mount if facts.place else None
    return mount.file_system_class if mount else FileSystemClass.UNKNOWN


def _over_network(facts: Facts) -> bool:
    mount = facts.place.mount if facts.place else None
    return mount is not None and mount.over_network


def _more_reasons(facts: Facts) -> Iterator[str]:
    if facts.amd:
        yield (
            "you have an AMD GPU: let weightlift fill it from its own small pinned buffers; programs that copy out of "
            "mapped files can fill all your memory while they do so"
        )
    if _crowds(facts):
        yield "if you load the same model often: with more memory than the model has, --cache keep would pay"
    speed = facts.speeds.fastest[1] if facts.speeds and facts.speeds.fastest else None
    disk = facts.place.disk if facts.place else None
    if (disk is not None and disk.turns) or (speed is not None and speed < _SLOW):
        known = f" ({speed:.2f} GB/s)" if speed is not None else ""
        yield f"your storage is slow{known}: nothing but a faster drive or a kept page cache makes loads quicker"


def _tools(facts: Facts, *, direct: bool) -> Iterator[ToolAdvice]:
    """What to tell other loaders; those that map files by default are what freezes such machines."""
    crowds = bool(_crowds(facts))
    # A network or a FUSE file system does not make mapping dangerous, only slow.
    slow_mapping = _over_network(facts) or _file_system(facts) in {FileSystemClass.PLAN9, FileSystemClass.FUSE}
    if facts.amd or facts.unified:
        why = "copies out of mapped files turn them into memory that only swap can take back"
    elif crowds and facts.has_gpu:
        why = "a mapped model larger than free memory pushes everything else out while it is read"
    elif slow_mapping:
        why = "mapped files wait for this file system page by page"
    else:
        yield from _tools_as_they_are()
        return
    mode = "dio" if direct and not facts.unified else "none"
    yield ToolAdvice(tool="llama.cpp", option=f"--load-mode {mode} (older versions: --no-mmap)", why=why)
    yield ToolAdvice(
        tool="Ollama", option='PARAMETER use_mmap false in the Modelfile, or "use_mmap": false in options', why=why
    )
    yield ToolAdvice(
        tool="ExLlamaV2",
        option="-fst, or EXLLAMA_FASTTENSORS=1 in the environment",
        why="its own reader uses direct reads into buffers instead of a mapping",
    )


def _tools_as_they_are() -> Iterator[ToolAdvice]:
    why = "mapped files are shared with the page cache, which has room for them here"
    yield ToolAdvice(tool="llama.cpp", option="nothing (--load-mode mmap is fine)", why=why)
    yield ToolAdvice(tool="Ollama", option="nothing", why=why)
    yield ToolAdvice(tool="ExLlamaV2", option="nothing", why=why)
