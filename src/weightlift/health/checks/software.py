"""Checks of what is installed: libraries and how they map, and weightlift itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightlift.health.findings import Check, Finding, Level, Rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightlift.health.facts import Facts

LIBRARIES_MAP = Rule(
    id="libraries-map-writable",
    level=Level.FACT,
    when="an installed library maps checkpoints private and writable, and no GPU here minds",
    why="what is edited in place becomes memory of the process; the rest stays page cache",
    mend="nothing to do; it matters once an AMD GPU or one with shared memory comes in",
)
TORCH_MISSING = Rule(
    id="torch-missing",
    level=Level.FACT,
    when="torch is not installed",
    why="tensors are made by numpy, and GPUs cannot be reached",
    mend="`pip install 'weightlift[torch]'`",
)
ENGINE_MISSING = Rule(
    id="native-engine-missing",
    level=Level.ADVICE,
    when="the native engine was not built or cannot be loaded",
    why="the Python engine does the same work, and is several times slower beside a busy Python program",
    mend="install a C compiler (`sudo apt install gcc`), then "
    "`pip install --force-reinstall --no-deps --no-cache-dir weightlift`",
)

RULES: Final = (LIBRARIES_MAP, TORCH_MISSING, ENGINE_MISSING)


def check_libraries(facts: Facts) -> Iterator[Finding]:
    """Which libraries are there and how they map."""
    if not facts.software.library("torch").version:
        yield TORCH_MISSING.found("torch is not installed")
    if facts.amd or facts.unified:
        # The checks of devices say so, louder.
        return
    named = [f"{found.name} {found.version}" for found in facts.software.libraries if found.maps_private_writable]
    if named:
        yield LIBRARIES_MAP.found(f"{' and '.join(named)} map checkpoints private and writable")


def check_engine(facts: Facts) -> Iterator[Finding]:
    """Whether weightlift's own engine is there."""
    if facts.software.engine:
        yield ENGINE_MISSING.found(facts.software.engine)


CHECKS: Final[tuple[Check, ...]] = (check_libraries, check_engine)
