"""The fake GPU, opened for a test in both kinds; its library is compiled once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from weightlift.testing.fake_devices import FakeDevices
from weightlift.testing.fake_gpu import FakeGpu, FakeGpuUnavailable, build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("fake-gpu"))
    except FakeGpuUnavailable as err:
        pytest.skip(str(err))


@pytest.fixture(params=["cuda", "hip"])
def gpu(request: pytest.FixtureRequest, fake_library: Path) -> Iterator[FakeGpu]:
    with FakeGpu(fake_library, request.param, seed=1, memory_bytes=256 << 20) as session:
        # The thread that carries work out starts with the first of it, and stays; tests look for threads left behind.
        stream, address = session.runtime.create_stream(0), session.allocate(0, 1)
        session.fill(stream, address, 0, 1)
        session.settle()
        session.runtime.destroy_stream(stream)
        session.free(address)
        yield session


@pytest.fixture
def devices(gpu: FakeGpu) -> Iterator[FakeDevices]:
    # The same goes for torch's own threads, which start with the first large operation on the CPU.
    torch.zeros(1 << 20).fill_(1)
    with FakeDevices(gpu) as fakes:
        yield fakes
