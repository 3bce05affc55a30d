"""What is said about every hostile file and folder, word for word, as ``refusals.txt`` beside this test has it.

Other tests look for a few words of each message; this one shows all of them to whoever changes one.
``python tests/formats/test_refusal_words.py`` writes the file anew.
"""

from __future__ import annotations

import json
import os
import runpy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from weightlift.errors import WeightliftError
from weightlift.formats import describe
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.gguf_bytes import entry, gguf_file, tensor
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE: Final = Path(__file__).parent
RECORD: Final = HERE / "refusals.txt"
TABLES: Final = (
    ("safetensors", "test_hostile_files.py", "CASES", HeaderRules.REFERENCE, "model.safetensors"),
    ("safetensors, strict", "test_hostile_files.py", "CASES", HeaderRules.STRICT, "model.safetensors"),
    ("safetensors, strict only", "test_hostile_files.py", "STRICT_CASES", HeaderRules.STRICT, "model.safetensors"),
    ("gguf", "test_gguf_hostile.py", "CASES", HeaderRules.REFERENCE, "model.gguf"),
    ("gguf, strict only", "test_gguf_hostile.py", "STRICT_CASES", HeaderRules.STRICT, "model.gguf"),
    ("pytorch", "test_pytorch_hostile.py", "CASES", HeaderRules.REFERENCE, "model.bin"),
)
"""Title, test module, its table of cases, the rules by which they are read, and the file's name."""


def with_files(*names: str) -> Callable[[Path], Path]:
    """A folder with empty files of these names, and with folders where they end in a slash."""

    def make(folder: Path) -> Path:
        for name in names:
            place = folder / name
            (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                place.touch()
        return folder

    return make


def with_text(name: str, text: str) -> Callable[[Path], Path]:
    """A file of this name and text."""

    def make(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return make


def sharded(missing: int = 0, **listed: str) -> Callable[[Path], Path]:
    """Three shards without the first so many, and an index that lists more than they hold."""

    def make(folder: Path) -> Path:
        model = write_checkpoint(folder / "model", SPECS, shards=3)
        index = model / "model.safetensors.index.json"
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] |= listed
        index.write_text(json.dumps(content), encoding="utf-8")
        for path in sorted(model.glob("*.safetensors"))[:missing]:
            path.unlink()
        return model

    return make


def twice(folder: Path) -> Path:
    """Two files with one tensor and no index."""
    for name in ("one", "two"):
        write_checkpoint(folder / f"{name}.safetensors", SPECS[:1])
    return folder


def two_formats(folder: Path) -> Path:
    """An index that lists files of two formats."""
    sharded(g="g.safetensors")(folder)
    (folder / "model" / "g.safetensors").write_bytes(gguf_file([tensor("g")], []))
    return folder / "model"


def parts(folder: Path, numbers: tuple[int, ...] = (0, 1), count: int = 2, total: int = 2) -> Path:
    """A split GGUF checkpoint of files that say they have these numbers."""
    for position, number in enumerate(numbers, start=1):
        keys = [entry("split.no", 2, number), entry("split.count", 2, count), entry("split.tensors.count", 5, total)]
        path = folder / f"m-{position:05}-of-{len(numbers):05}.gguf"
        path.write_bytes(gguf_file([tensor(f"t{position}")], keys))
    return folder / f"m-00001-of-{len(numbers):05}.gguf"


def one_part(folder: Path) -> Path:
    """The first of two parts."""
    first = parts(folder)
    (folder / "m-00002-of-00002.gguf").unlink()
    return first


def a_link(folder: Path, to: str) -> Path:
    """A link."""
    (folder / "model.safetensors").symlink_to(to)
    return folder / "model.safetensors"


def an_index_without_an_end(folder: Path) -> Path:
    """A sparse index of more bytes than are read."""
    with (folder / "model.safetensors.index.json").open("wb") as file:
        file.write(b"{")
        file.truncate((256 << 20) + 1)
    return folder


SPECS: Final = [TensorSpec(f"t{number}", "F32", (number + 1, 2)) for number in range(6)]
CACHE: Final = "models--org--name/"
PLACES: Final[dict[str, Callable[[Path], Path]]] = {
    "an empty folder": with_files(),
    "weights of other kinds": with_files(
        "optimizer.pt", "a.H5", "b.h5", "c.onnx", "d.msgpack", "e.npz", "f.incomplete"
    ),
    "files of many suffixes": with_files(
        "README", "LICENSE", "a.json", "b.json", "c.txt", "d.py", "e.md", "f.csv", "g.x"
    ),
    "a folder of models": with_files("models--a--b/"),
    "a folder of snapshots": with_files("snapshots/x"),
    "an entry without a snapshot": lambda folder: with_files(f"{CACHE}snapshots/")(folder) / CACHE,
    "an entry with several": lambda folder: with_files(*(f"{CACHE}snapshots/{x}/" for x in "abcdefg"))(folder) / CACHE,
    "several indexes": with_files("a.safetensors.index.json", "b.safetensors.index.json"),
    "GGUF files of several models": with_files("a.gguf", *(f"{name}-00001-of-00002.gguf" for name in "bcdef")),
    "PyTorch files of several models": with_files("a.bin", "b.pt", "c.pth", "d.ckpt"),
    "one tensor in two files": twice,
    "files of two formats": two_formats,
    "a part of a split model": lambda folder: with_files("m-00002-of-00003.gguf")(folder) / "m-00002-of-00003.gguf",
    "a part missing": one_part,
    "parts out of order": lambda folder: parts(folder, (0, 0)),
    "too few parts": lambda folder: parts(folder, count=3),
    "too few tensors in parts": lambda folder: parts(folder, total=5),
    "a shard missing": sharded(missing=1),
    "shards missing": sharded(missing=2),
    "a tensor that is not there": sharded(ghost="model-00002-of-00003.safetensors"),
    **{
        f"a shard named {shard!r}": sharded(evil=shard)
        for shard in ("../x", "..", "/etc/passwd", "C:\\x", "C:x", "a\\b", "a\0b", "", ".")
    },
    "an index without a map": with_text("x.index.json", '{"a": 1}'),
    "an index of nothing": with_text("x.index.json", '{"weight_map": {}}'),
    "an index without an end": an_index_without_an_end,
    "nothing": lambda folder: folder / "nothing",
    "a link to nothing": lambda folder: a_link(folder, "gone"),
    "a link to itself": lambda folder: a_link(folder, "model.safetensors"),
    "a folder named like a file": with_files("model.safetensors/"),
}
"""What is read that is no checkpoint; each is made in an empty folder, and what is read is returned."""


def refusals(folder: Path) -> Iterator[str]:
    """One paragraph for everything hostile: what it is, the error, its message and hint, and what it points at."""
    modules = {module: runpy.run_path(str(HERE / module)) for _, module, *_ in TABLES}
    for title, module, table, rules, name in TABLES:
        for case in modules[module][table]:
            path = folder / name
            path.write_bytes(case.content)
            yield f"# {title}: {case.name}\n{refusal(path, rules, folder)}"
    for number, (title, make) in enumerate(PLACES.items()):
        place = folder / f"place{number}"
        place.mkdir()
        yield f"# places: {title}\n{refusal(make(place), HeaderRules.REFERENCE, place)}"


def refusal(path: Path, rules: HeaderRules, folder: Path) -> str:
    """The error that a file is refused with."""
    try:
        describe(path, header=rules)
    except WeightliftError as error:
        known = {"path": error.path, "tensor": error.tensor, "offset": error.offset, "length": error.length}
        points = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
        return f"{type(error).__name__}: {error}\n({points})".replace(f"{folder}{os.sep}", "").replace(
            str(folder), "FOLDER"
        )
    return "accepted"


def test_refusals_say_what_they_said(tmp_path: Path) -> None:
    kept = RECORD.read_text(encoding="utf-8").split("\n\n")
    assert [*refusals(tmp_path)] == [paragraph.rstrip("\n") for paragraph in kept]


def main() -> None:
    """Write the record anew."""
    with tempfile.TemporaryDirectory() as folder:
        RECORD.write_text("\n\n".join(refusals(Path(folder))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
