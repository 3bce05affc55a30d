"""``python -m weightlift.run script.py …``: a program as it is, with weightlift under safetensors.

Owns nothing but the command line, which it reads as Python itself does: a script, ``-m module`` or ``-c command``, and
what follows belongs to the program. Options come from the environment, ``WEIGHTLIFT_METHOD`` and so on.
"""

from __future__ import annotations

import builtins
import os
import runpy
import sys
from typing import TYPE_CHECKING

from weightlift.integrations.patching import patch

if TYPE_CHECKING:
    from collections.abc import Sequence

_USAGE = """\
usage: python -m weightlift.run [-m module | -c command | script.py] [arguments of the program]

Runs a Python program with weightlift under safetensors, and so under transformers, diffusers and others.
Environment variables such as WEIGHTLIFT_METHOD and WEIGHTLIFT_HOST_MEMORY say how files are loaded.
"""


def main(words: Sequence[str]) -> int:
    """Run a program; its own exit code is left to it.

    Args:
        words: the command line behind ``python -m weightlift.run``.

    Returns:
        2 for wrong usage; a program that ends by itself gives 0.
    """
    if not words or (words[0] in {"-m", "-c"} and len(words) < 2):
        sys.stderr.write(_USAGE)
        return 2
    if words[0] in {"-h", "--help"}:
        sys.stdout.write(_USAGE)
        return 0
    patch()
    # For Python processes that the program starts, where the package is installed with its start-up file.
    os.environ["WEIGHTLIFT_PATCH"] = "1"
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        # Python puts the current folder first, as it did for this module.
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec")
        builtins.exec(code, {"__name__": "__main__", "__builtins__": builtins})  # noqa: S102 - what `python -c` does
    else:
        sys.argv = list(words)
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
