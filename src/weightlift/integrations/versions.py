"""Which versions of a framework an integration was tried with, and what happens with the others."""

from __future__ import annotations

import importlib.metadata
import re
from typing import TYPE_CHECKING

from weightlift.errors import MissingExtraError, UnsupportedError
from weightlift.options import from_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

OVERRIDE = "WEIGHTLIFT_UNTESTED_VERSIONS"


def installed_version(package: str) -> str | None:
    """A package's version, or ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def untested(package: str, known: Sequence[str]) -> str | None:
    """A sentence about a version that the integration is not known to work with, or ``None`` if it is.

    Args:
        package: the package as it is installed.
        known: versions, or their beginnings: ``5.`` stands for every 5.x.
    """
    version = installed_version(package)
    if version is None:
        # Run from its sources, without having been installed: nothing to judge by.
        return None
    release = re.split(r"[+]", version)[0]
    if any(release == one or (one.endswith(".") and release.startswith(one)) for one in known):
        return None
    if from_environment(OVERRIDE):
        return None
    shown = ", ".join(f"{one}x" if one.endswith(".") else one for one in known)
    return f"{package} {version} is installed, and weightlift's integration is known to work with {shown}"


def require_known(package: str, known: Sequence[str], *, allow_untested: bool) -> None:
    """Refuse a version that the integration is not known to work with.

    Args:
        package: the package as it is installed.
        known: see :func:`untested`.
        allow_untested: go on with any version.

    Raises:
        UnsupportedError: it is not one of them.
    """
    sentence = None if allow_untested else untested(package, known)
    if sentence:
        raise UnsupportedError(
            sentence, hint=f"pass allow_untested=True, or set {OVERRIDE}=1, to try it with this version all the same"
        )


def missing(package: str, extra: str) -> MissingExtraError:
    """The error for a framework that is not installed."""
    return MissingExtraError(f"{package} is not installed", hint=f"pip install {extra}")
