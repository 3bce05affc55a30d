"""Builds the native engine: a plain shared library beside the Python modules, loaded through ctypes.

The library has no Python API, so one wheel serves every Python version on a platform (``py3-none-<platform>``). Where
it cannot be built, the install goes on without it and the wheel is the pure one (``py3-none-any``).

The environment variable ``WEIGHTLIFT_BUILD_ENGINE`` decides: ``0`` leaves the library out, ``require`` makes a failed
build fatal, anything else tries and warns.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel as setuptools_bdist_wheel
from setuptools.command.build import build as setuptools_build
from setuptools.command.build_ext import build_ext as setuptools_build_ext

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
WANTED = os.environ.get("WEIGHTLIFT_BUILD_ENGINE", "auto")
ENGINE = Extension(
    "weightlift.engines.libweightlift_engine",
    sources=["src/weightlift/engines/_engine.c", "src/weightlift/formats/_values.c"],
    extra_compile_args=["-std=c11", "-O2", "-fPIC", "-pthread", "-Wall", "-Wextra", "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
    optional=WANTED != "require",
)

# Read by Python whenever it starts, from beside the installed package; without the variable it does nothing.
STARTUP = 'import os; os.environ.get("WEIGHTLIFT_PATCH", "0") in ("", "0") or __import__("weightlift.startup")\n'


class build(setuptools_build):
    """Starts from an empty build folder: a file left there by an earlier build would end up in the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        Path(self.build_lib, "weightlift_patch.pth").write_text(STARTUP, encoding="utf-8")


class build_ext(setuptools_build_ext):
    """Builds a library for ctypes instead of a Python extension module."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = (
            True  # two small files; a library older than its compiler flags would be worse than the second lost
        )

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext`` unless told not to; in an editable install an earlier library does not survive a failure."""
        if self.editable_mode:
            Path("src", self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        if WANTED == "0":
            self.warn("WEIGHTLIFT_BUILD_ENGINE=0: the native engine is left out")
            return
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library lies below the root: without the interpreter's version in its name."""
        return str(Path(*fullname.split("."))) + SUFFIX


class bdist_wheel(setuptools_bdist_wheel):
    """Tags the wheel by what is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>`` with the library, ``py3-none-any`` without."""
        command = self.get_finalized_command("build_ext")
        assert isinstance(command, build_ext)
        self.root_is_pure = not any(Path(output).exists() for output in command.get_outputs())
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[] if sys.platform == "win32" else [ENGINE],
    cmdclass={"build": build, "build_ext": build_ext, "bdist_wheel": bdist_wheel},
)
