"""What doctor recommends on made-up machines, and what it says other programs need to be told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from weightlift.health.facts import Facts, Speeds
from weightlift.health.recommend import recommend
from weightlift.host.block import BlockDevice
from weightlift.host.storage import DirectAccess
from weightlift.testing import machines

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("make", "method", "cache", "device", "words"),
    [
        (machines.two_7900_xtx, "direct", "drop", "cuda:0", ["37.0 GiB", "26.0 GiB", "AMD GPU", "load the same model"]),
        (machines.strix_halo, "direct", "drop", "cuda:0", ["share one memory", "60.0 GiB", "AMD GPU"]),
        (machines.gb10, "auto", "keep", "cuda:0", ["the next ones come out of memory"]),
        (machines.wsl2, "buffered", "keep", "cuda:0", ["another system"]),
        (machines.nfs, "buffered", "keep", "cuda:0", ["network"]),
        (machines.container_8_gib, "direct", "drop", "cpu", ["13.0 GiB", "7.00 GiB"]),
        (machines.workstation, "auto", "keep", "cuda:0", ["fit into free memory"]),
    ],
)
def test_known_machines(make: Callable[[], Facts], method: str, cache: str, device: str, words: list[str]) -> None:
    found = recommend(make())
    assert (found.method, found.cache, found.device) == (method, cache, device)
    said = " ".join(found.reasons)
    for word in words:
        assert word in said
    place = make().place
    assert place is not None
    assert found.command == f"weightlift load {place.path} --device {device} --method {method} --cache {cache}"


@pytest.mark.parametrize(
    ("make", "llama", "exllama"),
    [
        (machines.two_7900_xtx, "--load-mode dio", "-fst"),
        (machines.strix_halo, "--load-mode none", "-fst"),
        (machines.gb10, "--load-mode none", "-fst"),
        (machines.wsl2, "--load-mode none", "EXLLAMA_FASTTENSORS"),
        (machines.nfs, "--load-mode none", "EXLLAMA_FASTTENSORS"),
        (machines.workstation, "nothing", "nothing"),
        (machines.container_8_gib, "nothing", "nothing"),
    ],
)
def test_other_programs(make: Callable[[], Facts], llama: str, exllama: str) -> None:
    told = {tool.tool: tool for tool in recommend(make()).tools}
    assert told.keys() == {"llama.cpp", "Ollama", "ExLlamaV2"}
    assert llama in told["llama.cpp"].option
    assert exllama in told["ExLlamaV2"].option
    assert ("use_mmap" in told["Ollama"].option) is (llama != "nothing")
    assert ("--no-mmap" in told["llama.cpp"].option) is (llama != "nothing")


def test_without_a_place_a_model_that_fills_the_gpus_is_assumed() -> None:
    found = recommend(replace(machines.two_7900_xtx(), place=None))
    assert (found.method, found.cache) == ("direct", "drop")
    assert "fills your GPUs" in found.reasons[0]
    assert found.command.startswith("weightlift load PATH ")


def test_where_direct_reads_are_refused_the_cache_is_dropped_instead() -> None:
    refused = machines.place(37, direct=DirectAccess(False, 0, 0, "it refuses"))
    found = recommend(replace(machines.two_7900_xtx(), place=refused))
    assert (found.method, found.cache) == ("buffered", "drop")


def test_slow_storage_is_named_with_its_speed() -> None:
    facts = replace(machines.workstation(), speeds=Speeds(storage={"direct": 0.18}))
    assert any("0.18 GB/s" in reason for reason in recommend(facts).reasons)
    disk = BlockDevice(name="sda", kind="scsi", rotating=True)
    unmeasured = replace(machines.workstation(), place=machines.place(13, disk=disk), speeds=None)
    assert any("storage is slow" in reason for reason in recommend(unmeasured).reasons)
    assert not any("slow" in reason for reason in recommend(machines.workstation()).reasons)


def test_nothing_known_means_auto() -> None:
    found = recommend(Facts())
    assert (found.method, found.cache, found.device) == ("auto", "auto", "cpu")


def test_a_path_is_quoted_in_the_command() -> None:
    facts = replace(machines.workstation(), place=machines.place(13, path="/m/my model; reboot"))
    assert "'/m/my model; reboot'" in recommend(facts).command
