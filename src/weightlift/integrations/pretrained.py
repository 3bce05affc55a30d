"""``from_pretrained`` of transformers and diffusers with the weights read by weightlift, for one call and no longer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weightlift.integrations import diffusers, transformers
from weightlift.integrations.patching import patch
from weightlift.integrations.versions import missing, require_known

if TYPE_CHECKING:
    from weightlift.keywords import LoadKeywords


def from_pretrained(
    model_class: Any,
    path: Any,
    *arguments: Any,
    weightlift: LoadKeywords | None = None,
    allow_untested: bool = False,
    **named: Any,
) -> Any:
    """``model_class.from_pretrained(path, …)``, patched for the length of the call.

    Args:
        model_class: a class of transformers or diffusers, such as ``AutoModelForCausalLM`` or ``UNet2DModel``.
        path: a folder, or a model's name.
        *arguments: further arguments of its own.
        weightlift: how to load, as for :func:`weightlift.patch`.
        allow_untested: go on with any version of the framework.
        **named: further arguments of its own, ``device_map`` and ``dtype`` among them.

    Raises:
        UnsupportedError: the framework is of a version that this was not tried with.
        MissingExtraError: it is not installed.
    """
    package = str(model_class.__module__).partition(".")[0]
    for adapter in (transformers, diffusers):
        if package == adapter.PACKAGE:
            try:
                importlib.import_module(package)
            except ImportError as err:
                raise missing(package, package) from err
            require_known(package, adapter.KNOWN_VERSIONS, allow_untested=allow_untested)
    with patch(**(weightlift or {})):
        return model_class.from_pretrained(path, *arguments, **named)
