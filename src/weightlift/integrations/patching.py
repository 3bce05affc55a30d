"""``weightlift.patch``: weightlift in the place of safetensors, and so under what is written against safetensors.

Everything that opens safetensors files goes through a few functions of that library. A patch puts weightlift's in
their place in every module that has bound them, in modules loaded later too, and adds the adapters of the frameworks
whose own way of loading would otherwise bring each tensor into host memory first.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Self, Unpack

from weightlift.compat.safetensors.handle import safe_open
from weightlift.errors import OptionError
from weightlift.integrations import diffusers, transformers
from weightlift.integrations.replacing import AfterImport, Replacements
from weightlift.integrations.versions import untested
from weightlift.options import LoadOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from types import ModuleType, TracebackType

    from weightlift.keywords import LoadKeywords
    from weightlift.types import LoadReport

_active: list[Patch] = []
_changing = threading.RLock()
_REPORTS_KEPT = 64

_NOT_HERE = ("device", "names", "dtype", "framework", "progress", "digest", "readonly")
"""Options that the patched library's own arguments decide, or that have no meaning for its callers."""


class Patch:
    """A patch in force: a context manager, undone by :meth:`undo` or at the end of the ``with`` block.

    Attributes:
        replaced: the names that stand for weightlift's functions, as far as their modules are loaded.
        skipped: why a framework's adapter was left out, by the framework's name.
        reports: of the latest loads that an adapter made for a framework, the latest last.
    """

    def __init__(self, keywords: LoadKeywords) -> None:
        self._open = _patched_safe_open(keywords)
        self._replacements = Replacements()
        self.skipped: dict[str, str] = {}
        self.reports: deque[LoadReport] = deque(maxlen=_REPORTS_KEPT)
        self._hook = AfterImport(
            {
                "safetensors": self._replace_package,
                "safetensors.torch": self._replace_torch,
                "safetensors.numpy": self._replace_numpy,
                **self._adapters(),
            }
        )
        _active.append(self)
        self._hook.install()

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names that were rebound, each as ``module.name``."""
        return tuple(dict.fromkeys(map(str, self._replacements.names)))

    def _adapters(self) -> dict[str, Callable[[ModuleType], None]]:
        found: dict[str, Callable[[ModuleType], None]] = {}
        for adapter in (transformers, diffusers):

            def install(module: ModuleType, adapter: Any = adapter) -> None:
                sentence = untested(adapter.PACKAGE, adapter.KNOWN_VERSIONS)
                if sentence is None:
                    adapter.install(module, self._replacements, self._open.load_keywords, self.reports.append)
                else:
                    self.skipped[adapter.PACKAGE] = sentence

            found[adapter.MODULE] = install
        return found

    def _replace_package(self, module: ModuleType) -> None:
        self._replacements.replace(module.safe_open, self._open)

    def _replace_torch(self, module: ModuleType) -> None:
        opened = self._open

        def load_file(
            filename: str | os.PathLike[str], device: str | int | None = "cpu", *, backend: str = "mmap"
        ) -> dict[str, Any]:
            """Every tensor of a file by name; see :func:`weightlift.compat.safetensors.torch.load_file`."""
            with opened(filename, framework="pt", device=device, backend=backend) as file:
                return file.get_tensors()

        self._replacements.replace(module.load_file, load_file)

    def _replace_numpy(self, module: ModuleType) -> None:
        opened = self._open

        def load_file(filename: str | os.PathLike[str], *, backend: str = "mmap") -> dict[str, Any]:
            """Every array of a file by name; see :func:`weightlift.compat.safetensors.numpy.load_file`."""
            with opened(filename, framework="np", backend=backend) as file:
                return file.get_tensors()

        self._replacements.replace(module.load_file, load_file)

    def undo(self) -> None:
        """Put everything back as it was; files that are open stay weightlift's.

        Raises:
            OptionError: a later patch is still in force.
        """
        with _changing:
            if self not in _active:
                return
            if _active[-1] is not self:
                raise OptionError(
                    f"{len(_active) - 1 - _active.index(self)} later patches are still in force",
                    hint="undo them first, newest first",
                )
            _active.pop()
            self._hook.remove()
            self._replacements.undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        names = ", ".join(self.replaced) or "nothing yet: safetensors is not imported"
        left_out = "".join(f"; without {name}: {reason}" for name, reason in self.skipped.items())
        return f"<Patch of {names}{left_out}>"


def patch(**keywords: Unpack[LoadKeywords]) -> Patch:
    """Put weightlift under safetensors, and so under transformers, diffusers, accelerate, peft and others.

    Can be called before or after those are imported, as a plain call or in a ``with`` statement, and more than once:
    the latest counts.

    Args:
        **keywords: how files are loaded, as for :class:`~weightlift.options.LoadOptions`. What the libraries' own
            arguments decide (``device``, ``dtype``, ``names`` and the like) is not among them.

    Returns:
        The patch, which says what it replaced and can be undone.

    Raises:
        OptionError: an option is not possible, or not one of those that go here.
    """
    LoadOptions(**keywords)  # type: ignore[arg-type] # judged now, not when the first file is opened
    out_of_place = [name for name in keywords if name in _NOT_HERE]
    if out_of_place:
        raise OptionError(
            f"{out_of_place[0]}= has no place in a patch",
            hint="leave it out: it follows from what the patched library is called with",
        )
    with _changing:
        return Patch(keywords)


def _patched_safe_open(keywords: LoadKeywords) -> type[safe_open]:
    """A class of its own for each patch, so that undoing it does not touch names that were bound to the face itself."""

    class Opened(safe_open):
        __slots__ = ()
        load_keywords = keywords

    Opened.__name__ = Opened.__qualname__ = "safe_open"
    Opened.__doc__ = safe_open.__doc__
    return Opened
