"""What every target has to keep, as a test class to inherit from.

Needs pytest, and ``pytest.register_assert_rewrite("weightlift.testing.target_conformance")`` for readable failures.
"""

# ruff: noqa: D102 - the names of tests say what they show
from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pytest

from weightlift.buffers import SlotPool
from weightlift.engines.choice import make_engine
from weightlift.formats import describe
from weightlift.operations import ChunkReady, Failure, Sink
from weightlift.plan import plan_extents
from weightlift.shards import OpenShards
from weightlift.staging import plan_pool
from weightlift.testing.bench import threads_now
from weightlift.testing.conformance import PATIENCE_SECONDS, stop
from weightlift.testing.factory import tensor_bytes, write_checkpoint
from weightlift.testing.shapes import TensorSpec, every_dtype_specs
from weightlift.types import EngineName, Method
from weightlift.units import KIB, MIB, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from weightlift.description import Description
    from weightlift.plan import Wanted
    from weightlift.targets.base import Target


class TargetConformance(ABC):
    """What the pipeline relies on in a :class:`weightlift.targets.base.Target`, as tests."""

    specs: Sequence[TensorSpec] = (
        *every_dtype_specs(),
        TensorSpec("large", "F32", (300_000,)),
        TensorSpec("larger", "BF16", (1_000, 1_111)),
    )
    """The tensors of the checkpoint that is loaded."""

    @abstractmethod
    def make_target(self, description: Description, rows: Sequence[int]) -> Target:
        """A new target for some rows."""

    @abstractmethod
    def check(self, target: Target, delivered: Mapping[str, Any], stored: Mapping[str, bytes]) -> None:
        """Compare what was delivered with the bytes as stored, both by name."""

    def names_delivered(self, names: Sequence[str]) -> Sequence[str]:
        """Which of the names wanted the target delivers, in order; all by default."""
        return names

    @pytest.mark.parametrize("engine", [EngineName.PYTHON, EngineName.AUTO])
    @pytest.mark.parametrize("padding", ["reference", 3])
    @pytest.mark.parametrize("method", [Method.DIRECT, Method.BUFFERED, Method.AUTO])
    def test_what_is_stored_is_delivered(
        self, tmp_path: Path, method: Method, padding: Any, engine: EngineName
    ) -> None:
        write_checkpoint(tmp_path, self.specs, shards=2, padding=padding)
        description = describe(tmp_path)
        selections: list[Sequence[int]] = [range(len(description)), range(0, len(description), 3), []]
        for rows in selections:
            names = [description.names[row] for row in rows]
            target = self.make_target(description, rows)
            delivered = deliver(target, description, method, engine)
            stored = {spec.name: tensor_bytes(spec) for spec in self.specs if spec.name in names}
            assert [name for name, _ in delivered] == list(self.names_delivered(names))
            self.check(target, dict(delivered), stored)

    def test_a_load_given_up_leaves_nothing_running(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, self.specs)
        description = describe(tmp_path)
        threads = threads_now()
        self.make_target(description, range(len(description))).close()
        target = self.make_target(description, range(len(description)))
        target.prepare()
        target.close()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while threads_now() > threads:
            assert time.monotonic() < deadline, "the target left threads behind"


def deliver(target: Target, description: Description, method: Method, engine_name: EngineName) -> list[tuple[str, Any]]:
    """Carry a target from preparation to its tensors with small chunks and few slots; every slot has to come back."""
    used = sorted(set(description.shard_indexes))
    with OpenShards(description, used, want_direct=method is not Method.BUFFERED) as shards:
        wanted = target.prepare()
        check_wanted(wanted, description)
        extents = plan_extents(wanted, shards.facts, method, keep=False, in_order=target.in_order)
        pool = plan_pool(extents, budget_bytes=8 * MIB, processors=2, workers=3, chunk_bytes=64 * KIB)
        slots = SlotPool(pool.slot_count, pool.slot_bytes)
        engine = make_engine(engine_name, shards.sources, slots.memory, pool.worker_room)
        engine.set_limits(pool.workers, pool.chunk_bytes)
        engine.submit(extents)
        returned: list[int] = []

        def release(slot: int) -> None:
            returned.append(slot)
            engine.return_slot(slot)

        deadline, done, received = time.monotonic() + PATIENCE_SECONDS, 0, 0
        while done < len(extents):
            for event in engine.poll(0.1):
                assert not isinstance(event, Failure), event
                if isinstance(event, ChunkReady):
                    received += 1
                    target.receive(event, extents[event.extent].tag, release)
                else:
                    done += 1
            assert time.monotonic() < deadline, (
                f"{done} of {len(extents)} extents were done, {len(returned)} slots back"
            )
        tensors = list(target.finish())
        assert len(returned) == received, "every slot is given back once"
        stop(engine)
        target.close()
        slots.close()
    return tensors


def check_wanted(wanted: Sequence[Wanted], description: Description) -> None:
    """Check that what a target asks for can be carried out: inside the files, and mirrored where it says so."""
    for want in wanted:
        assert want.length > 0
        assert want.offset >= description.shards[want.shard].data_offset
        assert want.offset + want.length <= description.shards[want.shard].identity.size_bytes
        assert not want.mirrored or want.address % PAGE_BYTES == want.offset % PAGE_BYTES
        assert want.sink is not Sink.COPY or want.copies is not None
