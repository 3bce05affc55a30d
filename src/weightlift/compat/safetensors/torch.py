"""``safetensors.torch`` over weightlift: loading is weightlift's, saving and bytes in memory are the library's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlift.compat.safetensors.handle import safe_open
from weightlift.compat.safetensors.refusals import reference

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping


def load_file(
    filename: str | os.PathLike[str], device: str | int | None = "cpu", *, backend: str = "mmap"
) -> dict[str, Any]:
    """Every tensor of a file by name, in the order in which they lie in it.

    Args:
        filename: the file.
        device: where tensors go.
        backend: see :class:`~weightlift.compat.safetensors.handle.safe_open`.

    Raises:
        SafetensorError: the file breaks a rule of the format.
        OSError: it is not there, or cannot be read.
    """
    with safe_open(filename, framework="pt", device=device, backend=backend) as file:
        return file.get_tensors()


def load_model(
    model: Any,
    filename: str | os.PathLike[str],
    strict: bool = True,  # noqa: FBT001, FBT002 - the library's own signature
    device: str | int | None = "cpu",
    *,
    backend: str = "mmap",
) -> tuple[set[str], list[str]]:
    """Load a file into a torch module whose tensors may share memory.

    Args:
        model: the module.
        filename: the file.
        strict: refuse missing and unexpected names.
        device: where the file's tensors go before they are copied into the module.
        backend: see :class:`~weightlift.compat.safetensors.handle.safe_open`.

    Returns:
        Names of the module's that were not filled, and of the file's that were not used.

    Raises:
        RuntimeError: names (with ``strict``) or shapes do not match.
    """
    state = load_file(filename, device, backend=backend)
    repeated = _repeated_names(model.state_dict(), state)
    missing_names, unexpected = model.load_state_dict(state, strict=False)
    missing = set(missing_names)
    for name in repeated:
        if name in missing:
            missing.remove(name)
        else:
            unexpected.append(name)
    if strict and (missing or unexpected):
        sentences = [f"Error(s) in loading state_dict for {type(model).__name__}:"]
        for kind, names in (("Missing", missing), ("Unexpected", unexpected)):
            if names:
                quoted = ", ".join(f'"{name}"' for name in sorted(names))
                sentences.append(f"    {kind} key(s) in state_dict: {quoted}")
        raise RuntimeError("\n".join(sentences))
    return missing, unexpected


def _repeated_names(own: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterable[str]:
    """All names but one of each group of the module's tensors that share memory; the one that the file has is left."""
    groups = reference("torch")._remove_duplicate_names(  # noqa: SLF001 - which name stays has to be the library's choice
        own, preferred_names=list(stored)
    )
    return [name for names in groups.values() for name in names]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(reference("torch"), name)
