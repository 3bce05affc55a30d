"""Every target on host memory keeps what the pipeline relies on."""

# ruff: noqa: ARG002 - the kit passes what some target needs
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import xxhash

from weightlift.dtypes import SAFETENSORS
from weightlift.targets.digest import DigestTarget
from weightlift.targets.frameworks import FLOATING, pick_framework
from weightlift.targets.host import ConvertingTarget, HostTarget
from weightlift.targets.null import NullTarget
from weightlift.testing.target_conformance import TargetConformance
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightlift.description import Description
    from weightlift.targets.base import Target


class TestNullTarget(TargetConformance):
    def make_target(self, description: Description, rows: Sequence[int]) -> Target:
        return NullTarget(description, rows)

    def names_delivered(self, names: Sequence[str]) -> Sequence[str]:
        return []

    def check(self, target: Target, delivered: Mapping[str, Any], stored: Mapping[str, bytes]) -> None:
        assert target.host_bytes == 0


class TestDigestTarget(TestNullTarget):
    def make_target(self, description: Description, rows: Sequence[int]) -> Target:
        return DigestTarget(description, rows, 2)

    def check(self, target: Target, delivered: Mapping[str, Any], stored: Mapping[str, bytes]) -> None:
        assert isinstance(target, DigestTarget)
        assert target.digests == {name: xxhash.xxh3_128(data).hexdigest() for name, data in stored.items()}


class TestHostTarget(TargetConformance):
    def make_target(self, description: Description, rows: Sequence[int]) -> Target:
        return HostTarget(description, rows, pick_framework(Framework.NUMPY))

    def check(self, target: Target, delivered: Mapping[str, Any], stored: Mapping[str, bytes]) -> None:
        assert {name: tensor.tobytes() for name, tensor in delivered.items()} == stored
        assert all(tensor.flags.aligned and tensor.flags.writeable for tensor in delivered.values())
        assert target.host_bytes >= sum(map(len, stored.values()))


class TestConvertingTarget(TargetConformance):
    def make_target(self, description: Description, rows: Sequence[int]) -> Target:
        maker = pick_framework(Framework.NUMPY)
        return ConvertingTarget(description, rows, maker, dtype=numpy.dtype("float32"), device="cpu")

    # Random bits hold numbers that float32 has no room for.
    @pytest.fixture(autouse=True)
    def numbers_may_overflow(self) -> Any:
        with numpy.errstate(all="ignore"):
            yield

    def check(self, target: Target, delivered: Mapping[str, Any], stored: Mapping[str, bytes]) -> None:
        maker = pick_framework(Framework.NUMPY)
        for spec in self.specs:
            if spec.name not in stored:
                continue
            found = delivered[spec.name]
            kind = maker.stored_dtype(SAFETENSORS[spec.dtype])
            expected = numpy.frombuffer(stored[spec.name], kind)
            if spec.dtype in FLOATING:
                assert (found.dtype, found.shape) == (numpy.float32, spec.shape)
                numpy.testing.assert_array_equal(found.reshape(-1), expected.astype(numpy.float32), err_msg=spec.name)
            else:
                assert (found.dtype, found.tobytes()) == (kind, stored[spec.name]), spec.name


class TestElsewhereTarget(TargetConformance):
    """Another device that only torch reaches, as it is stored; the CPU by a name of its own stands for it."""

    def make_target(self, description: Description, rows: Sequence[int]) -> Target:
        return ConvertingTarget(description, rows, pick_framework(Framework.TORCH), dtype=None, device="cpu:0")

    def check(self, target: Target, delivered: Mapping[str, Any], stored: Mapping[str, bytes]) -> None:
        import torch

        for name, tensor in delivered.items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert data == stored[name], name
