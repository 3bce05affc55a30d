"""A report made by hand, with everything in it that a page shows."""

from __future__ import annotations

import pytest

from weightlift.samples import Intervention, Sample
from weightlift.types import BudgetTerm, FileReport, HostMemoryReport, LoadReport
from weightlift.units import GIB, MIB


def sample(index: int) -> Sample:
    return Sample(
        seconds=0.1 * (index + 1),
        read_bytes=(index + 1) * 100 * MIB,
        landed_bytes=index * 100 * MIB,
        tensor_bytes=0,
        anonymous_bytes=min(index, 5) * 8 * MIB,
        file_bytes=MIB,
        shared_bytes=0,
        pinned_bytes=min(index, 4) * 8 * MIB,
        page_cache_bytes=index * 10 * MIB,
        available_bytes=8 * GIB - index * 90 * MIB,
        swap_in_bytes=0,
        swap_out_bytes=max(0, index - 20) * 5 * MIB,
        machine_stall_seconds=max(0, index - 20) * 0.01,
        group_stall_seconds=None,
        device_bytes=index * 100 * MIB,
        workers=4 if index < 20 else 2,
        chunk_bytes=4 * MIB,
    )


@pytest.fixture
def full_report() -> LoadReport:
    return LoadReport(
        tensors=723,
        nbytes=3 * GIB,
        seconds=3.1,
        phases={"open": 0.05, "plan": 0.02, "read": 2.9, "finish": 0.1},
        device="cuda:0",
        engine="native",
        method_requested="auto",
        method_used={"direct": 2 * GIB, "buffered": GIB, "mmap": 0},
        reason="33% of the file was in the page cache and was taken from there, the rest was read directly past it",
        cache_requested="auto",
        cache_decided="drop",
        files=tuple(
            FileReport(path=f"/models/llama/model-{n}.safetensors", used={"direct": GIB}, reason="it was cold")
            for n in range(3)
        ),
        staging="pinned",
        staging_reason="copies out of pinned memory run at the speed of the link",
        workers=2,
        chunk_bytes=4 * MIB,
        host_memory=HostMemoryReport(
            budget_bytes=128 * MIB,
            staging_bytes=32 * MIB,
            description_bytes=400_000,
            peak_anonymous_bytes=40 * MIB,
            peak_file_bytes=MIB,
            peak_pinned_bytes=32 * MIB,
            peak_shared_bytes=0,
            terms=(BudgetTerm(name="staging slots", nbytes=32 * MIB, reason="8 slots of 4 MiB"),),
        ),
        page_cache_before_bytes=GIB,
        page_cache_after_bytes=GIB,
        swap_in_bytes=0,
        swap_out_bytes=45 * MIB,
        pressure_stall_seconds=0.09,
        ceilings={"storage": 3.4, "memory_copy": None, "link": None},
        bottleneck="storage",
        worker_seconds={"storage": 6.0, "device": 1.0, "waiting for a slot": 0.4, "copying": 0.0},
        floor_bytes=512 * MIB,
        interventions=(Intervention(2.1, "2 workers × 4096 KiB", "400 MiB of memory are left, the floor is 512 MiB"),),
        samples=tuple(sample(index) for index in range(30)),
    )
