"""The wheel as a user gets it: built from a copy of the tree, installed alone, imported from elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from weightlift.testing import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = f"weightlift/engines/libweightlift_engine.{'dylib' if sys.platform == 'darwin' else 'so'}"
COMPILER = os.environ.get("CC", "cc")  # named in every build, since the one Python was built with may be another
BUILD_INPUTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "src")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; its output is the failure's message if it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WEIGHTLIFT_BUILD_ENGINE")}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "CC": COMPILER, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that nothing is written into the tree under test."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def build(tree: Path, **environment: str) -> Path:
    """Build the wheel without network: with the setuptools that is installed here."""
    output = tree.parent / "wheels"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", output)
    run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=tree.parent, **environment)
    (wheel,) = output.iterdir()
    return wheel


def tag(wheel: Path) -> tuple[str, str, str]:
    """The three parts of a wheel's compatibility tag."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    return python, abi, platform


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel alone into a fresh environment and return its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder.parent)
    return python


def imported_from(python: Path, folder: Path) -> str:
    """Where ``import weightlift`` finds the package, and its version."""
    program = "import weightlift, weightlift._version as v; print(weightlift.__file__, v.__version__)"
    return run(python, "-W", "error", "-c", program, cwd=folder).strip()


needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which(COMPILER.split()[0]) is None,
    reason="there is no C compiler, or the system is Windows, where the native engine is not built",
)


@needs_compiler
def test_wheel_carries_the_engine_and_serves_every_python_version(tree: Path, tmp_path: Path) -> None:
    wheel = build(tree, WEIGHTLIFT_BUILD_ENGINE="require")

    python_tag, abi_tag, platform_tag = tag(wheel)
    assert (python_tag, abi_tag) == ("py3", "none")
    assert platform_tag != "any"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/WHEEL"))).decode()
    assert LIBRARY in names
    assert "weightlift/py.typed" in names
    # The fake GPU runtime belongs to the public test kit, which compiles it where tests run.
    assert [name for name in names if name.endswith(".c")] == ["weightlift/testing/fake_gpu.c"]
    assert "Root-Is-Purelib: false" in metadata

    python = install(wheel, tmp_path / "environment")
    assert imported_from(python, tmp_path).startswith(str(tmp_path / "environment"))
    (library,) = (tmp_path / "environment").rglob(Path(LIBRARY).name)
    run(python, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).wl_abi()", cwd=tmp_path)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"WEIGHTLIFT_BUILD_ENGINE": "0"}, id="left-out"),
        pytest.param({"CC": "weightlift-has-no-such-compiler"}, id="no-compiler"),
        pytest.param({"CFLAGS": "-weightlift-has-no-such-flag"}, id="compiler-fails"),
    ],
)
def test_wheel_without_the_engine_is_pure_and_works(tree: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    (tree / "src" / LIBRARY).write_bytes(b"left by an editable install")

    wheel = build(tree, **environment)

    assert tag(wheel) == ("py3", "none", "any")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/WHEEL"))).decode()
    assert LIBRARY not in names
    assert "Root-Is-Purelib: true" in metadata

    python = install(wheel, tmp_path / "environment")
    assert imported_from(python, tmp_path).startswith(str(tmp_path / "environment"))


STAND_IN = """
class SafetensorError(Exception): ...
class safe_open: ...
"""


def test_variable_patches_programs_that_know_nothing_of_it(tree: Path, tmp_path: Path) -> None:
    """In an environment of its own, with a stand-in for safetensors; nothing happens without the variable."""
    python = install(build(tree, WEIGHTLIFT_BUILD_ENGINE="0"), tmp_path / "environment")
    (site,) = (tmp_path / "environment").rglob("weightlift_patch.pth")
    (site.parent / "safetensors.py").write_text(STAND_IN)
    # What weightlift depends on is borrowed from here.
    (site.parent / "borrowed.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    program = (
        "import sys; early = 'weightlift' in sys.modules; import safetensors as s; print(early, s.safe_open.__module__)"
    )

    def says(**environment: str) -> str:
        return run(python, "-c", program, cwd=tmp_path, **environment).strip()

    assert says(WEIGHTLIFT_PATCH="") == says(WEIGHTLIFT_PATCH="0") == "False safetensors"
    assert says(WEIGHTLIFT_PATCH="1") == "True weightlift.integrations.patching"
    assert says(WEIGHTLIFT_PATCH="1", WEIGHTLIFT_METHOD="fast").startswith("weightlift: WEIGHTLIFT_PATCH has no effect")


def test_commands_run_without_the_source_tree(tree: Path, tmp_path: Path) -> None:
    """In an environment with nothing but the wheel and what it needs, from a folder with nothing but a model."""
    python = install(build(tree, WEIGHTLIFT_BUILD_ENGINE="0"), tmp_path / "environment")
    (site,) = (tmp_path / "environment").rglob("weightlift_patch.pth")
    for package in ("msgspec", "rich", "markdown_it", "mdurl", "pygments", "xxhash"):
        (site.parent / package).symlink_to(Path(pytest.__file__).parents[1] / package)
    folder = tmp_path / "empty"
    folder.mkdir()
    make_checkpoint(folder / "model.safetensors")
    for words in (
        ("inspect", "model.safetensors"),
        ("load", "model.safetensors", "--device", "null"),
        ("bench", "model.safetensors", "--device", "null", "--rounds", "3", "--paths", "direct", "--plot", "plot.svg"),
    ):
        assert "model.safetensors" in run(python, "-W", "error", "-m", "weightlift", *words, cwd=folder)
    assert (folder / "plot.svg").read_text().startswith("<svg ")


def test_wheel_has_nothing_that_an_earlier_build_left_behind(tree: Path) -> None:
    former = tree / "src" / "weightlift" / "former.py"
    former.touch()
    first = build(tree)
    with zipfile.ZipFile(first) as archive:
        assert "weightlift/former.py" in archive.namelist()
    first.unlink()
    former.unlink()

    with zipfile.ZipFile(build(tree, WEIGHTLIFT_BUILD_ENGINE="0")) as archive:
        names = archive.namelist()
    assert "weightlift/former.py" not in names
    assert LIBRARY not in names


@needs_compiler
def test_editable_install_puts_the_engine_into_the_tree_and_takes_a_stale_one_away(tree: Path, tmp_path: Path) -> None:
    library = tree / "src" / LIBRARY
    library.unlink(missing_ok=True)
    program = "import setuptools.build_meta as backend; backend.build_editable('../editable')"

    run(sys.executable, "-c", program, cwd=tree, WEIGHTLIFT_BUILD_ENGINE="require")
    run(sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).wl_abi()", cwd=tmp_path)
    run(sys.executable, "-c", program, cwd=tree, CC="weightlift-has-no-such-compiler")

    assert not library.exists()


def test_required_engine_makes_a_failed_build_fatal(tree: Path) -> None:
    with pytest.raises(AssertionError, match="weightlift-has-no-such-compiler"):
        build(tree, WEIGHTLIFT_BUILD_ENGINE="require", CC="weightlift-has-no-such-compiler")
