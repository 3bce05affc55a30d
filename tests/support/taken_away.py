"""Takes away from weightlift what Linux offers and other systems lack; whoever tests it keeps everything.

Calls that :mod:`os` has are missing in the module that weightlift's modules import by that name. ``/proc`` and control
groups are not there for what opens files in weightlift's name. System calls without a name in :mod:`os` are lost
through the functions that make them. What the compiled engine asks by itself goes with the engine.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import io
import os
import pkgutil
import sys
import types
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CALLS: Final = ("preadv", "posix_fadvise", "O_DIRECT")
HIDDEN: Final = {"proc": "/proc", "groups": "/sys/fs/cgroup"}
PARTS: Final = (*CALLS, "cachestat", "statx", *HIDDEN, "engine")
"""Everything that can be taken away."""

_PACKAGE: Final = "weightlift"
_KEPT: Final = "weightlift.testing"
_OPENING: Final = ("open", "listdir", "readlink", "stat", "scandir")
_BETWEEN: Final = frozenset(("contextlib", "genericpath", "io", "os", "pathlib", "posixpath", __name__))
"""Modules that ask the system in somebody else's name."""

_IMPORTED_BEFORE: Final = ("msgspec", "rich.progress", "xxhash", "numpy", "ml_dtypes", "torch", "safetensors.torch")
"""What weightlift imports and is not to lose anything."""


class _Lacking(types.ModuleType):
    """A module as it is now and at any time, without some names."""

    def __init__(self, module: types.ModuleType, names: Sequence[str]) -> None:
        super().__init__(module.__name__)
        self.__dict__["_module"], self.__dict__["_names"] = module, frozenset(names)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_names"]:
            raise AttributeError(f"{name} was taken away")
        return getattr(self.__dict__["_module"], name)


def take_away(parts: Sequence[str]) -> None:
    """Take parts away from weightlift, which must not have been imported, for the rest of this process.

    Args:
        parts: of :data:`PARTS`.

    Raises:
        ValueError: one is not known.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"nothing called {', '.join(sorted(unknown))} can be taken away; {', '.join(PARTS)} can")
    assert not any(name.partition(".")[0] == _PACKAGE for name in sys.modules), "weightlift has been imported already"
    if "engine" in parts:
        os.environ["WEIGHTLIFT_ENGINE_LIBRARY"] = "/nonexistent/library.so"
    hidden = tuple(root for name, root in HIDDEN.items() if name in parts)
    for name in _OPENING if hidden else ():
        setattr(os, name, _hiding(getattr(os, name), hidden))
    if hidden:
        builtins.open = io.open = _hiding(builtins.open, hidden)
    _import_lacking([name for name in CALLS if name in parts])
    kernel: Any = importlib.import_module("weightlift.host.kernel")
    if hidden:
        read_small = kernel.read_small
        kernel.read_small = lambda path: None if _is_under(path, hidden) else read_small(path)
    if "cachestat" in parts:
        kernel.cachestat = lambda *_, **__: None
    if "statx" in parts:
        kernel.statx_direct_alignment = lambda *_, **__: None


def _import_lacking(names: Sequence[str]) -> None:
    """Import all of weightlift but its test kit while ``os`` lacks names."""
    for name in _IMPORTED_BEFORE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["os"] = _Lacking(os, names)
    try:
        package = importlib.import_module(_PACKAGE)
        for module in pkgutil.walk_packages(package.__path__, f"{_PACKAGE}.", onerror=lambda _: None):
            if not module.name.startswith((_KEPT, f"{_PACKAGE}.__main__")):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)
    finally:
        sys.modules["os"] = os


def _is_under(path: Any, roots: tuple[str, ...]) -> bool:
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(roots)


def _hiding(original: Callable[..., Any], roots: tuple[str, ...]) -> Callable[..., Any]:
    def guarded(path: Any = ".", *arguments: Any, **keywords: Any) -> Any:
        if _is_under(path, roots) and _asks_for_weightlift(sys._getframe(1)):
            raise FileNotFoundError(2, "taken away", os.fspath(path))
        return original(path, *arguments, **keywords)

    return guarded


def _asks_for_weightlift(frame: types.FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.partition(".")[0] == _PACKAGE and not name.startswith(_KEPT)
