"""What weightlift believes of HIP's runtime holds for the real library and its header; no GPU is needed."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from weightlift.host import gpu
from weightlift.host.gpu import CALLS
from weightlift.testing.fake_gpu import SOURCE

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = Path(os.environ.get("WEIGHTLIFT_TEST_HIP") or ROOT / ".cache" / "hip")
LIBRARY: Final = "libamdhip64.so.5"
NAMES: Final = {
    2: "hipErrorOutOfMemory",
    3: "hipErrorNotInitialized",
    35: "hipErrorInsufficientDriver",
    100: "hipErrorNoDevice",
    101: "hipErrorInvalidDevice",
    600: "hipErrorNotReady",
    700: "hipErrorIllegalAddress",
    719: "hipErrorLaunchFailure",
}

# A process of its own: the search path of libraries is read at its start, and loading the runtime leaves traces.
SCRIPT: Final = """
import ctypes, json, sys
from weightlift.errors import DeviceError
from weightlift.host.gpu import CALLS, find_runtime

before = find_runtime("hip")
library = ctypes.CDLL(sys.argv[1])
runtime = find_runtime("hip")
answers = {}
attempts = {
    "device_count": [], "current_device": [], "create_stream": [0], "create_event": [0], "memory_info": [0],
    "pci_bus_id": [0], "unregister": [4096], "destroy_stream": [0], "destroy_event": [0], "synchronize_stream": [0],
}
for method, arguments in attempts.items():
    try:
        answers[method] = repr(getattr(runtime, method)(*arguments))
    except DeviceError as err:
        answers[method] = [err.code, err.name, err.call, str(err)]
print(json.dumps({
    "before": before if isinstance(before, str) else None,
    "path": runtime.path,
    "missing": [call.hip for call in CALLS.values() if not hasattr(library, call.hip)],
    "texts": {code: runtime.error_text(code) for code in map(int, sys.argv[2:])},
    "table": list(runtime.function_table()),
    "version": runtime.runtime_version(),
    "set_device": runtime.set_device(0),
    "answers": answers,
}))
"""

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(),
    reason=f"HIP's runtime was not fetched into {FOLDER}: run tools/fetch_hip.py, or set WEIGHTLIFT_TEST_HIP",
)


def fake_names() -> dict[int, str]:
    """HIP's names for error codes, as the fake runtime has them."""
    entries = re.findall(r'X\((\d+), \w+, "\w+", "(\w+)"', SOURCE.read_text(encoding="utf-8"))
    return {int(code): name for code, name in entries}


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """What the real library answers."""
    (library,) = FOLDER.rglob(LIBRARY)
    search = ":".join(sorted({str(path.parent) for path in FOLDER.rglob("*.so*")}))
    codes = [str(code) for code in {**NAMES, **fake_names()}]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), *codes],
        env={**os.environ, "LD_LIBRARY_PATH": search},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


@pytest.fixture(scope="module")
def header() -> str:
    """The runtime's headers as one text, without comments and default values of arguments."""
    names = ("hip_runtime_api.h", "driver_types.h")
    text = "".join((FOLDER / "usr/include/hip" / name).read_text(encoding="utf-8") for name in names)
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    return re.sub(r"__dparm\([^)]*\)|=\s*NULL", " ", text)


def c_type(declared: str, handles: set[str]) -> type[Any]:
    """The ctypes type for a declared argument, ``void *`` for every pointer."""
    words = declared.replace("*", " * ").split()
    if "*" in words or handles & set(words):
        return ctypes.c_void_p
    known: Mapping[str, type[Any]] = {
        "int": ctypes.c_int,
        "size_t": ctypes.c_size_t,
        "unsigned": ctypes.c_uint,
        "hipError_t": ctypes.c_int,
        "hipMemcpyKind": ctypes.c_int,
    }
    return known[words[0]]


def test_the_library_is_found_once_it_is_loaded(real: dict[str, Any]) -> None:
    assert real["before"] == "no HIP runtime (libamdhip64) is loaded in this process"
    assert Path(real["path"]).name.startswith(LIBRARY)


def test_every_function_is_there(real: dict[str, Any]) -> None:
    assert real["missing"] == []
    assert all(real["table"])
    assert len(set(real["table"])) == len(real["table"]) == 8


@pytest.mark.parametrize("role", CALLS)
def test_signatures_are_those_of_the_header(header: str, role: str) -> None:
    handles = set(re.findall(r"typedef\s+struct\s+\w+\s*\*\s*(\w+)\s*;", header))
    assert {"hipStream_t", "hipEvent_t"} <= handles
    call = CALLS[role]
    prototypes = re.findall(rf"^([\w ]+[ *]+){call.hip}\s*\(([^()]*)\)\s*;", header, re.MULTILINE)
    assert prototypes, call.hip
    for result, parameters in prototypes:
        wanted = tuple(c_type(each, handles) for each in parameters.split(",") if each.strip() not in {"", "void"})
        assert call.arguments == wanted, parameters
        assert call.result is (ctypes.c_char_p if "char" in result else c_type(result, handles))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hipMemcpyHostToDevice", gpu._HOST_TO_DEVICE),
        ("hipStreamNonBlocking", gpu._STREAM_NON_BLOCKING),
        ("hipEventDisableTiming", gpu._EVENT_DISABLE_TIMING),
        ("hipHostRegisterPortable", gpu._REGISTER_PORTABLE),
        ("hipErrorNotReady", gpu.NOT_READY),
        ("hipErrorOutOfMemory", gpu.OUT_OF_MEMORY),
    ],
)
def test_numbers_are_those_of_the_header(header: str, name: str, value: int) -> None:
    found = re.findall(rf"\b{name}\s*=?\s*(0x[0-9a-fA-F]+|\d+)", header)
    assert {int(number, 0) for number in found} == {value}


def test_error_codes_have_the_names_that_weightlift_and_the_fake_know(real: dict[str, Any]) -> None:
    assert set(gpu._HINTS) - {46} <= set(NAMES)  # 46 is CUDA's alone
    for code, name in {**fake_names(), **NAMES}.items():
        assert re.match(rf"{name} \({code}\)(: .+)?\Z", real["texts"][str(code)]), (code, name)


def test_the_version_is_that_of_the_header(real: dict[str, Any]) -> None:
    text = (FOLDER / "usr/include/hip/hip_version.h").read_text(encoding="utf-8")
    numbers = [re.findall(rf"HIP_VERSION_{part}\s+(\d+)", text)[0] for part in ("MAJOR", "MINOR", "PATCH")]
    assert real["version"] == ".".join(numbers)


def test_without_a_gpu_every_call_gives_a_named_error(real: dict[str, Any]) -> None:
    answers = real["answers"]
    if isinstance(answers["device_count"], str):
        pytest.skip(f"this machine has {answers['device_count']} GPUs that HIP can use")
    code, name, call, text = answers["device_count"]
    assert (code, name, call) == (100, "hipErrorNoDevice", "hipGetDeviceCount")
    assert "hipGetDeviceCount failed: hipErrorNoDevice (100)" in text
    assert "HIP_VISIBLE_DEVICES" in text
    assert real["set_device"] in NAMES
    for method, answer in answers.items():
        assert isinstance(answer, list), (method, answer)
        assert answer[1].startswith("hipError"), (method, answer)
