"""Putting functions and classes in the place of others, wherever modules have bound their names, and back again.

``from safetensors import safe_open`` binds a name of its own in every module that says so. A replacement therefore goes
through all loaded modules by identity, and is told of modules that are loaded later.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

_LEFT_ALONE = ("weightlift.", "safetensors._safetensors_rust")


class Replaced(NamedTuple):
    """A name that stands for something else now.

    Attributes:
        module: the module that binds it.
        name: the name.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Replacements:
    """What was put in the place of what, and where; undone exactly, newest first."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self.names: list[Replaced] = []

    def replace(self, original: Any, substitute: Any) -> None:
        """Have every name that stands for ``original`` stand for ``substitute``."""
        self._pairs.append((original, substitute))
        self.names.extend(_rebind(original, substitute))

    def set(self, owner: Any, name: str, substitute: Any) -> None:
        """Replace an attribute of one class or module, and no other name for what it stood for."""
        self._pairs.append((_Attribute(owner, name, owner.__dict__[name]), substitute))
        where = owner.__name__ if isinstance(owner, types.ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        self.names.append(Replaced(where, name))
        setattr(owner, name, substitute)

    def undo(self) -> None:
        """Put everything back, also in modules that bound a substitute in the meantime."""
        while self._pairs:
            original, substitute = self._pairs.pop()
            if isinstance(original, _Attribute):
                setattr(original.owner, original.name, original.value)
            else:
                _rebind(substitute, original)


class _Attribute(NamedTuple):
    owner: Any
    name: str
    value: Any


def _rebind(old: Any, new: Any) -> list[Replaced]:
    changed = []
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(_LEFT_ALONE) or module is None:
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)
                changed.append(Replaced(module_name, name))
    return changed


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls back once a module has been executed, before anybody can bind its names.

    Args:
        callbacks: what to call with each module, by the module's name.
    """

    def __init__(self, callbacks: dict[str, Callable[[ModuleType], None]]) -> None:
        self._callbacks = callbacks

    def install(self) -> None:
        """Call back at once for modules that are loaded, and from now on for those that will be."""
        sys.meta_path.insert(0, self)
        for name, callback in self._callbacks.items():
            module = sys.modules.get(name)
            # A module that is being imported right now has no names to replace yet, and is not seen again.
            if module is not None:
                callback(module)

    def remove(self) -> None:
        """Call back no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module as the others would, and have the callback follow its execution."""
        callback = self._callbacks.get(fullname)
        if callback is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Announcing(spec.loader, callback)
                return spec
        return None


class _Announcing(importlib.abc.Loader):
    """Another loader, followed by a callback."""

    def __init__(self, loader: Any, callback: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._callback = callback

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """See :class:`importlib.abc.Loader`."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """See :class:`importlib.abc.Loader`."""
        self._loader.exec_module(module)
        # What looks at the module later finds it as if nobody had stood in between.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._callback(module)
