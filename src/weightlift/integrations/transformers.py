"""transformers 5: ``from_pretrained`` onto devices without a copy of the model in host memory.

transformers opens every shard for the CPU, collects a lazy slice per tensor, hands all of them to a pool of threads in
the order in which it will use them, and moves each tensor on once it was read. The adapter takes the place of the two
functions that do this: requests are collected in that order and served by one stream, straight onto their devices.
Whatever it does not know (shards of tensor parallelism, tensors that are not slices of files) is left to transformers.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
from typing import TYPE_CHECKING, Any, Final

from weightlift.compat.safetensors.slices import PySafeSlice
from weightlift.integrations.sessions import Session
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from weightlift.integrations.replacing import Replacements
    from weightlift.keywords import LoadKeywords
    from weightlift.types import LoadReport

PACKAGE: Final = "transformers"
MODULE: Final = "transformers.core_model_loading"
KNOWN_VERSIONS: Final = ("5.",)

_session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("weightlift_transformers", default=None)


def install(
    module: ModuleType,
    replacements: Replacements,
    keywords: LoadKeywords,
    note: Callable[[LoadReport], None],
) -> None:
    """Put the adapter in place.

    Args:
        module: transformers' ``core_model_loading``.
        replacements: remembers what was replaced.
        keywords: how to load, as for :class:`~weightlift.options.LoadOptions`.
        note: told of every load that was made.
    """
    load, materialise = module.convert_and_load_state_dict_in_model, module.spawn_materialize

    @functools.wraps(load)
    def convert_and_load_state_dict_in_model(*arguments: Any, **named: Any) -> Any:
        session = Session(keywords)
        token = _session.set(session)
        try:
            return load(*arguments, **named)
        finally:
            _session.reset(token)
            session.close()
            if session.report is not None:
                note(session.report)

    @functools.wraps(materialise)
    def spawn_materialize(  # noqa: PLR0917 - the signature of what it replaces
        thread_pool: Any,
        tensor: Any,
        device: Any = None,
        dtype: Any = None,
        sharding_op: Any = None,
        tensor_idx: int | None = None,
    ) -> Any:
        session = _session.get()
        place = _place(tensor, device) if session is not None and sharding_op is None else None
        if session is None or place is None:
            return materialise(thread_pool, tensor, device, dtype, sharding_op, tensor_idx)
        pending = session.request(tensor, place, lambda found: _finished(found, dtype))
        # Without a pool transformers expects something to call, when and if it wants the tensor.
        return pending if thread_pool is not None else pending.result

    replacements.replace(load, convert_and_load_state_dict_in_model)
    replacements.replace(materialise, spawn_materialize)


def _place(tensor: Any, device: Any) -> str | None:
    """The device that a slice of one of our files goes to, or ``None`` if this is not for the adapter."""
    if not isinstance(tensor, PySafeSlice) or tensor.file.framework is not Framework.TORCH or tensor.file.mapped:
        return None
    torch = importlib.import_module("torch")
    if device is None:
        return str(tensor.file.place)
    place = torch.device(device)
    if place.type == "meta":
        return None
    tensor.file.check_tensor(tensor.row)
    return str(place)


def _finished(tensor: Any, dtype: Any) -> Any:
    return tensor if dtype is None else tensor.to(dtype=dtype)
