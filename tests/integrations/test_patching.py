"""Names are rebound wherever they are bound, later too, and put back exactly."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

import weightlift
from weightlift.compat.safetensors import safe_open as face
from weightlift.errors import OptionError
from weightlift.integrations.replacing import AfterImport, Replacements
from weightlift.testing.factory import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import sys
from safetensors import safe_open
from safetensors.torch import load_file
import safetensors
with safe_open({path!r}, framework="pt") as file:
    print(type(file).__mro__[1].__module__, sorted(file.keys())[0], load_file.__module__, sys.argv[1:])
"""


def names_bound() -> dict[str, Any]:
    """Every name of every module that stands for something a patch replaces."""
    return {
        f"{module}.{name}": value
        for module, loaded in list(sys.modules.items())
        for name, value in list(getattr(loaded, "__dict__", {}).items())
        if name in {"safe_open", "load_file", "safe_load_file", "spawn_materialize"}
    }


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module that has bound the library's names, one of them under another name."""
    module = types.ModuleType("a_consumer")
    module.__dict__.update(safe_open=safetensors.safe_open, read=safetensors.torch.load_file)
    monkeypatch.setitem(sys.modules, "a_consumer", module)
    return module


def test_names_are_replaced_wherever_they_are_bound_and_put_back(tmp_path: Path, consumer: types.ModuleType) -> None:
    path, _ = make_checkpoint(tmp_path / "m.safetensors", dtype="F32", shape=(3, 4))
    before = names_bound()
    with weightlift.patch() as patch:
        assert issubclass(safetensors.safe_open, face)
        assert consumer.safe_open is safetensors.safe_open
        assert consumer.read is safetensors.torch.load_file
        assert {"a_consumer.safe_open", "a_consumer.read", "safetensors.safe_open"} <= set(patch.replaced)
        assert "a_consumer.read" in repr(patch)
        mine = safetensors.torch.load_file(path)
        assert numpy.array_equal(safetensors.numpy.load_file(path)["tensor_000"], mine["tensor_000"].numpy())
        late = types.ModuleType("bound_while_patched")
        late.__dict__["opener"] = safetensors.safe_open
        sys.modules["bound_while_patched"] = late
    try:
        assert late.opener is safetensors.safe_open
        assert names_bound() == before
        assert torch.equal(safetensors.torch.load_file(path)["tensor_000"], mine["tensor_000"])
    finally:
        del sys.modules["bound_while_patched"]
    patch.undo()


def test_the_face_itself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_user_of_the_face")
    module.__dict__["safe_open"] = face
    monkeypatch.setitem(sys.modules, "a_user_of_the_face", module)
    with weightlift.patch():
        assert module.safe_open is face
    assert module.safe_open is face


def test_later_patches_count_and_are_undone_first(tmp_path: Path) -> None:
    path, _ = make_checkpoint(tmp_path / "m.safetensors", dtype="F32", shape=(2100, 1000))
    original = safetensors.safe_open
    outer = weightlift.patch(method="buffered")
    inner = weightlift.patch(method="mmap")
    with safetensors.safe_open(path, framework="pt") as file:
        file.get_tensors()
        assert file.reports[-1].method_requested == "mmap"
    with pytest.raises(OptionError, match="1 later"):
        outer.undo()
    inner.undo()
    with safetensors.safe_open(path, framework="pt") as file:
        file.get_tensors()
        assert file.reports[-1].method_requested == "buffered"
    outer.undo()
    assert safetensors.safe_open is original


def test_options_are_judged_at_once() -> None:
    before = safetensors.safe_open
    with pytest.raises(OptionError, match="fast"):
        weightlift.patch(method="fast")
    with pytest.raises(OptionError, match="device="):
        weightlift.patch(device="cuda:0")
    assert safetensors.safe_open is before


def test_other_frameworks_reach_the_library_itself(tmp_path: Path) -> None:
    path, _ = make_checkpoint(tmp_path / "m.safetensors")
    original = safetensors.safe_open
    with weightlift.patch():
        assert type(safetensors.safe_open(path, framework="flax")) is original


def test_modules_imported_later_are_announced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_late_module.py").write_text("from safetensors import safe_open\nvalue = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[types.ModuleType] = []
    hook = AfterImport({"a_late_module": seen.append})
    hook.install()
    try:
        import a_late_module  # type: ignore[import-not-found]
    finally:
        hook.remove()
        sys.modules.pop("a_late_module", None)
    assert seen == [a_late_module]
    assert a_late_module.value == 1
    assert type(a_late_module.__spec__.loader).__name__ == "SourceFileLoader"
    assert a_late_module.__loader__ is a_late_module.__spec__.loader
    assert hook not in sys.meta_path


def test_an_attribute_alone_can_be_replaced() -> None:
    class Owner:
        @staticmethod
        def method() -> int:
            return 1

    kept = Owner.__dict__["method"]
    replacements = Replacements()
    replacements.set(Owner, "method", staticmethod(lambda: 2))
    assert Owner.method() == 2
    replacements.undo()
    assert Owner.__dict__["method"] is kept


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", ["script", "module", "command"])
def test_programs_that_know_nothing_of_it(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = make_checkpoint(tmp_path / "m.safetensors")
    script = tmp_path / "a_program.py"
    script.write_text(PROGRAM.format(path=str(path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = {"script": [str(script)], "module": ["-m", "a_program"], "command": ["-c", script.read_text()]}[form]
    finished = run("-m", "weightlift.run", *words, "--flag", "x")
    assert finished.stdout.split(maxsplit=3) == [
        *("weightlift.compat.safetensors.handle", "tensor_000", "weightlift.integrations.patching"),
        "['--flag', 'x']\n",
    ], finished.stderr


def test_a_programs_own_ending_is_kept(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(7)\n")
    assert run("-m", "weightlift.run", str(tmp_path / "ends.py")).returncode == 7
    (tmp_path / "fails.py").write_text("raise ValueError('its own')\n")
    failed = run("-m", "weightlift.run", str(tmp_path / "fails.py"))
    assert failed.returncode == 1
    assert "ValueError: its own" in failed.stderr


@pytest.mark.parametrize("words", [[], ["-m"], ["-c"]])
def test_wrong_usage(words: list[str]) -> None:
    finished = run("-m", "weightlift.run", *words)
    assert finished.returncode == 2
    assert "usage:" in finished.stderr


def test_threads_open_and_read_at_once(tmp_path: Path) -> None:
    """Several threads on one handle and on several, in orders of their own."""
    import random
    from concurrent.futures import ThreadPoolExecutor

    path, _ = make_checkpoint(tmp_path / "m.safetensors", dtype="F32", shape=(300, 1000), count=48)
    expected = {name: tensor.nan_to_num() for name, tensor in safetensors.torch.load_file(path).items()}
    with weightlift.patch():
        shared = safetensors.safe_open(path, framework="pt")

        def same(seed: int) -> bool:
            names = sorted(expected)
            if seed:
                random.Random(seed).shuffle(names)
            handle = safetensors.safe_open(path, framework="pt") if seed % 2 else shared
            return all(torch.equal(handle.get_tensor(name).nan_to_num(), expected[name]) for name in names)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(same, range(16)))
