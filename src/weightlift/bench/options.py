"""What a benchmark is to do: its options, judged when they are made.

Knows the names of paths and peers, and measures nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from weightlift.bench.contestants import ALL_PEERS, PATHS, PEERS, find_peer
from weightlift.errors import OptionError
from weightlift.options import LoadOptions
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDS: Final = 5
ROUNDS_MAX: Final = 100
ROUNDS_OF_A_RESULT: Final = 3
"""Below that many runs nothing is called a result: no fractions, no ratios."""

_DEVICE: Final = re.compile(r"cpu|null|cuda(:\d{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """How to measure.

    Attributes:
        device: ``cpu``, ``null`` or ``cuda:N``; ``None`` for the first GPU that can be used, else the CPU, or ``null``
            where no framework is installed.
        rounds: how often everything is run.
        paths: names from :data:`~weightlift.bench.contestants.PATHS`.
        names: globs of the tensors wanted; ``None`` for all.
        host_memory: the budget of weightlift's own loads; ``None`` for the default.
        against: names of other loaders, or ``all`` for those that are installed.
        cold: drop the model's files from the page cache to measure cold loads too.
        header: how headers are judged.

    Raises:
        OptionError: a value is not one of those possible.
        BudgetError: ``host_memory`` is under the smallest possible budget.
    """

    device: str | None = None
    rounds: int = ROUNDS
    paths: Sequence[str] = tuple(PATHS)
    names: Sequence[str] | None = None
    host_memory: int | str | None = None
    against: Sequence[str] = ()
    cold: bool = True
    header: HeaderRules | str = HeaderRules.REFERENCE

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= ROUNDS_MAX:
            raise OptionError(f"rounds={self.rounds} is out of range", hint=f"from 1 to {ROUNDS_MAX}")
        if self.device is not None and _DEVICE.fullmatch(self.device) is None:
            raise OptionError(
                f"device={self.device!r} cannot be measured", hint="one of cpu, null, cuda:0, cuda:1 and so on"
            )
        unknown = [path for path in self.paths if path not in PATHS]
        if unknown or not self.paths:
            raise OptionError(f"paths={','.join(unknown)!r} is not possible", hint=f"any of {', '.join(PATHS)}")
        for name in self.against:
            if name != ALL_PEERS and find_peer(name) is None:
                known = ", ".join((ALL_PEERS, *(peer.name for peer in PEERS)))
                raise OptionError(f"against={name!r}: no loader of that name is known", hint=f"any of {known}")
        if self.against and self.names:
            raise OptionError(
                "names=… and against=… do not go together", hint="other loaders are measured on the whole model"
            )
        if self.against and self.device == "null":
            raise OptionError(
                'against=… does not go with device="null"',
                hint='other loaders cannot read and discard: use device="cpu" or "cuda:0"',
            )
        LoadOptions(**self.load_keywords())  # type: ignore[arg-type]

    def load_keywords(self) -> dict[str, object]:
        """What every load of weightlift's own is given."""
        keywords: dict[str, object] = {"header": self.header}
        if self.host_memory is not None:
            keywords["host_memory"] = self.host_memory
        if self.names is not None:
            keywords["names"] = tuple(self.names)
        return keywords
