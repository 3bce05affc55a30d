"""What tests of formats share: doing without permissions, and without descriptors."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_NOBODY = 65534


@contextlib.contextmanager
def _without_privileges() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


@pytest.fixture
def ordinary_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes this process one of an ordinary user for a while, who may read what the test's folder allows to others.

    Paths have to be relative to that folder: those above it are closed to others.
    """
    if not hasattr(os, "seteuid"):
        pytest.skip("this system has no such users")
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return _without_privileges
