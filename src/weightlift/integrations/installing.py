"""What the integrations of single frameworks have in common: one call puts them in place, and one takes them away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from weightlift.integrations.replacing import Replacements

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from weightlift.types import LoadReport


class Installed:
    """An integration in force: a context manager, undone by :meth:`undo` or at the end of the ``with`` block.

    Attributes:
        report: of the latest load for the framework that has ended; onto GPUs, ExLlamaV2's and ExLlamaV3's end when the
            framework closes its files.
        loads: how many have ended.
    """

    def __init__(self) -> None:
        self.replacements = Replacements()
        self.report: LoadReport | None = None
        self.loads = 0
        self.on_undo: Callable[[], None] | None = None

    @property
    def replaced(self) -> tuple[str, ...]:
        """What was replaced, each as ``module.name``."""
        return tuple(dict.fromkeys(map(str, self.replacements.names)))

    def note(self, report: LoadReport) -> None:
        """Remember the latest load."""
        self.report = report
        self.loads += 1

    def undo(self) -> None:
        """Put everything back as it was; tensors that were loaded stay."""
        self.replacements.undo()
        if self.on_undo is not None:
            self.on_undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<Installed in the place of {', '.join(self.replaced)}>"
