"""Which peers take part, at which settings, by what is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weightlift.bench import contestants
from weightlift.bench.contestants import PATHS, find_peer, own_contestants, peer_contestants
from weightlift.bench.loaders import LOADERS
from weightlift.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable

    Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make these packages the only ones that are installed."""

    def put(**versions: str) -> None:
        named = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(contestants, "installed_version", lambda package: named.get(package, ""))

    return put


@pytest.mark.parametrize(
    ("version", "device", "names"),
    [
        ("0.8.0", "cpu", ["safetensors 0.8.0"]),
        ("0.8.0", "cuda:1", ["safetensors 0.8.0"]),
        ("0.9.0rc1", "cpu", ["safetensors 0.9.0rc1", "safetensors 0.9.0rc1, pread"]),
        (
            "0.10.2",
            "cuda:0",
            ["safetensors 0.10.2", "safetensors 0.10.2, prefetch", "safetensors 0.10.2, prefetch, 16 threads"],
        ),
    ],
)
def test_settings_are_those_that_the_version_has(install: Install, version: str, device: str, names: list[str]) -> None:
    install(torch="2.13.0", safetensors=version)
    found, left_out = peer_contestants(["all"], device)
    assert [one.name for one in found] == names
    assert [one.mapped for one in found] == [device == "cpu" and "pread" not in name for name in names]
    assert left_out.keys() == {"fastsafetensors", "instanttensor", "runai-model-streamer"}


def test_a_peer_that_was_named_has_to_be_there(install: Install) -> None:
    install(torch="2.13.0", safetensors="0.8.0")
    with pytest.raises(MissingExtraError, match=r"runai-model-streamer is not installed(?s:.*)pip install runai"):
        peer_contestants(["safetensors", "runai_model_streamer"], "cpu")


def test_a_peer_that_cannot_load_there_says_so(install: Install) -> None:
    install(torch="2.13.0", instanttensor="0.2.2")
    assert peer_contestants(["instanttensor"], "cpu") == ([], {"instanttensor": "it does not load to cpu"})
    assert [one.environment for one in peer_contestants(["instanttensor"], "cuda:0")[0]] == [
        {},
        {"INSTANTTENSOR_BACKEND": "MMAP"},
    ]


def test_peers_need_torch(install: Install) -> None:
    install(safetensors="0.8.0")
    found, left_out = peer_contestants(["safetensors"], "cpu")
    assert found == []
    assert "torch" in left_out["safetensors 0.8.0"]


def test_every_setting_has_its_loader() -> None:
    assert {setting.loader for peer in contestants.PEERS for setting in peer.settings} < LOADERS.keys()
    assert find_peer("RunAI_Model-Streamer") is not None
    assert find_peer("all") is None


def test_own_paths_carry_what_was_asked_for() -> None:
    found = own_contestants(["auto-drop", "mmap"], {"host_memory": "8MiB"}, "cpu")
    assert [one.options for one in found] == [
        {"host_memory": "8MiB", "method": "auto", "cache": "drop"},
        {"host_memory": "8MiB", "method": "mmap", "cache": "auto"},
    ]
    assert [one.mapped for one in found] == [False, True]
    assert not any(one.mapped for one in own_contestants(list(PATHS), {}, "null"))
