"""The real ExLlamaV3 loader over weightlift; its own way of reading in Python is what results are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from weightlift.errors import (
    CheckpointNotFoundError,
    FileChangedError,
    FormatError,
    TruncatedFileError,
    UnsupportedError,
)
from weightlift.integrations import exllamav3 as integration
from weightlift.integrations import versions
from weightlift.testing.factory import write_checkpoint
from weightlift.testing.shapes import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from weightlift.integrations.installing import Installed
    from weightlift.testing.fake_devices import FakeDevices

KEYS = ("model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "model.norm", "model.half", "model.one")


@pytest.fixture(params=["padded", "unpadded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two files; ExLlamaV3 itself writes headers without padding, so tensors lie at odd offsets."""
    torch.manual_seed(0)
    first = {"model.layers.0.a": torch.randn(40, 24).bfloat16(), "model.layers.0.b": torch.randn(1100, 600).bfloat16()}
    second = {
        "model.layers.1.a": torch.randint(0, 1000, (16, 8), dtype=torch.int16),
        "model.norm": torch.randn(33),
        "model.half": torch.randn(7).half(),
        "model.one": torch.tensor(5, dtype=torch.int32),
        "model.empty": torch.zeros(0, 4, dtype=torch.float16),
    }
    for number, state in enumerate((first, second), 1):
        path = tmp_path / f"model-{number}.safetensors"
        safetensors.torch.save_file(state, path)
        if request.param == "unpadded":
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            header = content[8 : 8 + length].rstrip()
            header += b" " * (len(header) % 2 == 0)
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return tmp_path


@pytest.fixture
def installed(exllamav3_loader: Any) -> Iterator[Installed]:
    with integration.install() as found:
        yield found


def requests(collection: Any) -> dict[str, Any]:
    """Tensors in every form that modules ask for."""
    found = {f"{key} as it is": collection.get_tensor(key, torch.device("cpu"), allow_bf16=True) for key in KEYS}
    for key in ("model.layers.0.a", "model.layers.0.b"):
        found[f"{key} in half"] = collection.get_tensor(key, torch.device("cpu"))
        found[f"{key} transposed"] = collection.get_tensor(key, torch.device("cpu"), transpose=True)
    found["norm in half"] = collection.get_tensor("model.norm", torch.device("cpu"), float2half=True)
    found["padded"] = collection.get_tensor("model.layers.0.a", torch.device("cpu"), pad_to=(64, 32))
    return found


def equal(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in theirs
    )


@pytest.mark.parametrize("deferred", [True, False])
def test_a_collection(exllamav3_loader: Any, folder: Path, installed: Installed, deferred: bool) -> None:
    stock = requests(exllamav3_loader.SafetensorsCollection(str(folder), load_method="python"))
    collection = exllamav3_loader.SafetensorsCollection(str(folder))
    if deferred:
        collection.begin_deferred_load()
    mine = requests(collection)
    if deferred:
        assert installed.loads == 0
        collection.end_deferred_load()
        assert installed.loads == 1
    assert equal(mine, stock)
    collection.close()
    collection.begin_deferred_load()
    again = requests(collection)
    collection.end_deferred_load()
    assert equal(again, stock)


def test_one_expert_out_of_a_fused_tensor(exllamav3_loader: Any, tmp_path: Path, installed: Installed) -> None:
    write_checkpoint(tmp_path / "m.safetensors", [TensorSpec("experts", "F16", (4, 6, 8))])
    stock = exllamav3_loader.SafetensorsCollection(str(tmp_path), load_method="python")
    mine = exllamav3_loader.SafetensorsCollection(str(tmp_path))
    for index in range(4):
        arguments = {"no_defer": True, "fidx": index}
        left, right = (each.get_tensor("experts", **arguments).view(torch.int16) for each in (mine, stock))
        assert torch.equal(left, right)


def test_a_variant_of_two_collections(exllamav3_loader: Any, folder: Path, installed: Installed) -> None:
    main = exllamav3_loader.SafetensorsCollection(str(folder))
    other = exllamav3_loader.SafetensorsCollection(str(folder))
    variant = exllamav3_loader.VariantSafetensorsCollection(main)
    variant.add_stc(["model.layers.0.*"], other)
    variant.begin_deferred_load()
    mine = {key: variant.get_tensor(key, torch.device("cpu"), allow_bf16=True) for key in KEYS}
    variant.end_deferred_load()
    stock = exllamav3_loader.SafetensorsCollection(str(folder), load_method="python")
    assert equal(mine, {key: stock.get_tensor(key, torch.device("cpu"), allow_bf16=True) for key in KEYS})


def test_an_aborted_load_reads_nothing(exllamav3_loader: Any, folder: Path, installed: Installed) -> None:
    collection = exllamav3_loader.SafetensorsCollection(str(folder))
    collection.begin_deferred_load()
    requests(collection)
    collection.abort_deferred_load()
    collection.begin_deferred_load()
    collection.end_deferred_load()
    assert installed.loads == 0


def test_raw_pointers_on_devices(
    exllamav3_loader: Any, folder: Path, devices: FakeDevices, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Destinations carved out of one block of a device's memory, some of them converted there."""
    on_host = integration.memory_at
    # The fake devices' memory is the host's.
    monkeypatch.setattr(integration, "memory_at", lambda address, nbytes, _: on_host(address, nbytes, "cpu"))
    extension = exllamav3_loader.ext
    collection = exllamav3_loader.SafetensorsCollection(str(folder))
    rows: list[tuple[int, ...]] = []
    places: list[int] = []
    expected: list[tuple[int, int, bytes]] = []
    handles = []
    blocks = [memory.allocate(torch.uint8, (4 << 20,)) for memory in devices.memories]
    for index, (filename, header) in enumerate(sorted(collection.file_headers.items())):
        handles.append(extension.stloader_open_file(filename))
        for number, (_, entry) in enumerate(sorted(header.items())):
            if not isinstance(entry, dict) or "shape" not in entry:
                continue
            begin, end = entry["data_offsets"]
            device = number % 2
            place = sum(places[-1:]) or 256
            converts = entry["dtype"] == "BF16" and number % 3 == 0
            address = blocks[device].data_ptr() + place
            offset = header["_header_offset"] + begin
            rows.append((index, offset, end - begin, address, end - begin, 4 | converts, device))
            stored = (folder / filename).read_bytes()[offset : offset + end - begin]
            if converts:
                half = torch.frombuffer(bytearray(stored), dtype=torch.bfloat16).half()
                stored = bytes(half.view(torch.uint8).numpy().tobytes())
            expected.append((device, place, stored))
            places.append(place + -(-(end - begin) // 256) * 256)
    extension.stloader_deferred_batch(handles, torch.tensor(sorted(rows)), 4 << 20)
    devices.memories[0]._gpu.settle()
    for device, place, stored in expected:
        assert bytes(blocks[device][place : place + len(stored)].numpy().tobytes()) == stored
    assert installed.loads == 0
    extension.stloader_close_file(handles[0])
    assert installed.report is not None
    assert (installed.loads, installed.report.tensors) == (1, sum(row[2] > 0 for row in rows))
    assert set(installed.report.device.split(", ")) == {"cuda:0", "cuda:1"}


def test_a_file_that_shrinks_is_named_and_nothing_is_made_up(
    exllamav3_loader: Any, folder: Path, installed: Installed
) -> None:
    collection = exllamav3_loader.SafetensorsCollection(str(folder))
    collection.begin_deferred_load()
    collection.get_tensor("model.layers.0.b", torch.device("cpu"))
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises((TruncatedFileError, FileChangedError), match=r"model-1\.safetensors"):
        collection.end_deferred_load()


def test_rows_that_cannot_be_right(exllamav3_loader: Any, folder: Path, installed: Installed) -> None:
    extension = exllamav3_loader.ext
    handle = extension.stloader_open_file(str(folder / "model-1.safetensors"))
    target = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(FormatError, match="destination of 16"):
        extension.stloader_read(handle, 0, 17, target)
    with pytest.raises(FormatError, match="were asked for"):
        extension.stloader_read(handle, 1 << 40, 16, target)
    with pytest.raises(FormatError, match="destination of 8"):
        extension.stloader_deferred_batch([handle], torch.tensor([(0, 0, 16, target.data_ptr(), 8, 0, -1)]), 4 << 20)
    with pytest.raises(CheckpointNotFoundError):
        extension.stloader_open_file(str(folder / "missing.safetensors"))
    assert not target.any()


def test_handles_of_the_extension_stay_its_own(exllamav3_loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection that was in use before keeps its handles: they are file pointers."""
    seen: list[str] = []
    real = exllamav3_loader.ext
    with integration.install():
        extension = exllamav3_loader.ext
        for name in ("stloader_close_file", "stloader_read", "stloader_deferred_batch"):
            monkeypatch.setattr(real, name, lambda *_, name=name: seen.append(name), raising=False)
        extension.stloader_read([1, 2], 0, 1, torch.zeros(1))
        extension.stloader_deferred_batch([[1, 2]], torch.zeros(0, 7), 1)
        extension.stloader_close_file([1, 2])
        assert extension.something_else() == 0
    assert seen == ["stloader_read", "stloader_deferred_batch", "stloader_close_file"]
    assert exllamav3_loader.ext is real


def test_versions_that_were_not_tried(exllamav3_loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda _: "2.0")
    with pytest.raises(UnsupportedError, match=r"exllamav3 2\.0 .* 1\.6\.5"):
        integration.install()
    with integration.install(allow_untested=True) as installed:
        assert installed.replaced == ("exllamav3.loader.safetensors.ext",)
