"""The keyword arguments that every public call takes, for type checkers; :class:`LoadOptions` judges their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from weightlift.manifest import Manifest
    from weightlift.recording import Recording
    from weightlift.types import CachePolicy, EngineName, Framework, HeaderRules, Method, Staging


class LoadKeywords(TypedDict, total=False):
    """See :class:`~weightlift.options.LoadOptions` for what each means."""

    method: Method | str
    cache: CachePolicy | str
    host_memory: int | str
    staging: Staging | str
    engine: EngineName | str
    device: Any
    names: str | Sequence[str] | None
    dtype: Any
    dequantize: bool
    framework: Framework | str
    header: HeaderRules | str
    progress: Callable[[int, int], None] | None
    readonly: bool
    digest: bool
    verify: Manifest | str | os.PathLike[str] | None
    workers: int | None
    chunk_bytes: int | str | None
    watch_seconds: float
    recording: Recording | None
