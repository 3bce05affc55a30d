"""The probe of the link, on the fake runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weightlift.bench.loaders import LOADERS, FirstTensor
from weightlift.errors import DeviceError
from weightlift.health.probes import link_speed
from weightlift.targets.access import gpu_access
from weightlift.targets.frameworks import pick_framework
from weightlift.types import Framework

if TYPE_CHECKING:
    from weightlift.targets.device import DeviceAccess
    from weightlift.testing.fake_devices import FakeDevices
    from weightlift.testing.fake_gpu import FakeGpu


def reached(device: str) -> DeviceAccess:
    access = gpu_access(device, pick_framework(Framework.TORCH))
    assert not isinstance(access, str), access
    return access


def test_copies_are_pinned_and_everything_is_given_back(gpu: FakeGpu, devices: FakeDevices) -> None:
    before = gpu.counters()
    assert link_speed(reached("cuda:1"), seconds=0.0) >= 0
    assert link_speed(reached("cuda:1"), seconds=0.01) > 0
    after = gpu.counters()
    assert after.copies - before.copies >= 8
    assert after.unregistered_copies == before.unregistered_copies
    assert (after.streams, after.events, after.registrations) == (before.streams, before.events, before.registrations)


def test_a_refusal_is_the_runtimes_error_and_leaves_nothing(gpu: FakeGpu, devices: FakeDevices) -> None:
    before = gpu.counters()
    gpu.fail("HostRegister", code=2)
    with pytest.raises(DeviceError):
        link_speed(reached("cuda:0"), seconds=0.01)
    after = gpu.counters()
    assert (after.streams, after.events, after.registrations) == (before.streams, before.events, before.registrations)


def test_the_benchmark_measures_the_link_by_the_same_probe(gpu: FakeGpu, devices: FakeDevices) -> None:
    before = gpu.counters().copies
    assert LOADERS["link"]({"device": "cuda:0"})(FirstTensor())["gigabytes_per_second"] > 0
    assert gpu.counters().copies - before >= 8
