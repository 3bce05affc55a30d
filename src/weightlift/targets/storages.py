"""A storage of its own for each tensor of a slab, so that programs do not take neighbours for tensors that are tied.

Which tensors share memory is told by their storages nearly everywhere. accelerate leaves out all but one of those with
the same storage when it saves a model (``clean_state_dict_for_safetensors``), safetensors' ``save_model`` and
``load_model`` refuse a tensor that does not fill its storage, ``torch.save`` of one tensor writes its storage whole.

DLPack (https://dmlc.github.io/dlpack) gives the storage: torch hands a tensor out and takes it back as memory of
somebody else, which is as long as the tensor and keeps it, and so the slab, alive. Neither releases the interpreter
lock. What is lost is ``record_stream``, which knows memory by the allocator that handed it out and leaves other alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class OwnStorages:
    """Makes tensors with storages of their own out of parts of a slab.

    Args:
        torch: the module.

    One for each device: what works on one need not on another.
    """

    def __init__(self, torch: Any) -> None:
        public = torch.utils.dlpack
        # The public function looks at what it is given for as long as the private one takes.
        self._hand_out, self._take_back = public.to_dlpack, getattr(torch._C, "_from_dlpack", public.from_dlpack)  # noqa: SLF001
        self._works: dict[Any, bool] = {}

    def of(self, part: Any, dtype: Any) -> Any:
        """The same tensor over the same memory with its own storage; as it is where this torch cannot do that.

        Args:
            part: contiguous, of one element or more.
            dtype: its data type.
        """
        works = self._works.get(dtype)
        if works is None:
            works = self._works[dtype] = self._works_for(part)
        return self._take_back(self._hand_out(part)) if works else part

    def of_all(self, parts: Sequence[Any], dtype: Any) -> Sequence[Any]:
        """The same of several that have one data type."""
        first = self.of(parts[0], dtype)
        if not self._works[dtype]:
            return parts
        hand_out, take_back = self._hand_out, self._take_back
        return [first, *(take_back(hand_out(part)) for part in parts[1:])]

    def _works_for(self, part: Any) -> bool:
        """Whether a tensor comes back as it went out; some versions have no code for some types."""
        try:
            back = self._take_back(self._hand_out(part))
        except (BufferError, RuntimeError, TypeError, ValueError):
            return False
        same = (back.dtype, back.device, back.shape, back.data_ptr()) == (
            part.dtype,
            part.device,
            part.shape,
            part.data_ptr(),
        )
        return same and back.untyped_storage().nbytes() == part.nbytes
