"""Shared by all tests: which of them this machine can run, and how hypothesis behaves."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from taken_away import take_away

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

# Failures inside the public conformance kit shall read like failures in a test; it must not have been imported before.
pytest.register_assert_rewrite(
    "weightlift.testing.bench",
    "weightlift.testing.conformance",
    "weightlift.testing.engine_machine",
    "weightlift.testing.target_conformance",
    "weightlift.testing.trace_conformance",
)

MISSING = frozenset(filter(None, os.environ.get("WEIGHTLIFT_TEST_WITHOUT", "").split(",")))
"""What this run has to do without: names of parts of Linux, see ``taken_away``. Other conftests import weightlift."""
if MISSING:
    take_away(sorted(MISSING))

# How long an example takes depends on the machine, and no test judges time.
hypothesis.settings.register_profile("weightlift", deadline=None, print_blob=True)
# For a night: pytest --hypothesis-profile=deep tests/stateful
hypothesis.settings.register_profile("deep", hypothesis.settings.get_profile("weightlift"), max_examples=5000)
hypothesis.settings.load_profile("weightlift")

# Shells start programs in the background with interrupts ignored, which every child inherits, and tests of Ctrl-C would
# wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _missing_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch finds no GPU"


def _missing_root() -> str | None:
    if not hasattr(os, "geteuid"):
        return "this system has no root user"
    return None if os.geteuid() == 0 else "not running as root"


def _missing_engine() -> str | None:
    named = os.environ.get("WEIGHTLIFT_ENGINE_LIBRARY")
    if named:
        return None if os.path.exists(named) else f"WEIGHTLIFT_ENGINE_LIBRARY={named} does not exist"
    package = importlib.util.find_spec("weightlift.engines")
    folders = list(package.submodule_search_locations or ()) if package else []
    names = ("libweightlift_engine.so", "libweightlift_engine.dylib")
    found = any(os.path.exists(os.path.join(folder, name)) for folder in folders for name in names)
    return None if found else "the native engine is not built here (no C compiler when weightlift was installed?)"


@pytest.fixture(autouse=True)
def nothing_found_out() -> None:
    """No test's loads depend on what those of another found out about the drive."""
    keeping = sys.modules.get("weightlift.keeping")
    if keeping is not None:
        keeping.forget()


@pytest.fixture(scope="session")
def tool() -> Callable[[str], ModuleType]:
    """Loads one of the project's own tools by its name; they are scripts, and on nobody's import path."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load


_REASONS: dict[str, Callable[[], str | None]] = {
    "gpu": _missing_gpu,
    "root": _missing_root,
    "native": _missing_engine,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason; each machine is asked once, and only if a test needs it."""
    reasons: dict[str, str | None] = {"slow": None if config.getoption("--slow") else "slow; give --slow to run it"}
    for item in items:
        needed = {part for mark in item.iter_markers("needs") for part in mark.args}
        if needed & MISSING:
            item.add_marker(pytest.mark.skip(reason=f"needs what was taken away: {', '.join(needed & MISSING)}"))
        for mark in {mark.name for mark in item.iter_markers()} & (_REASONS.keys() | {"slow"}):
            if mark not in reasons:
                reasons[mark] = _REASONS[mark]()
            reason = reasons[mark]
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
