"""How long the longest headers take that the format allows, in odd and hostile forms, beside the reference parser.

Each header is opened once by each reader in a fresh process, which says how long it took, how much of it the processor
was at work for it, and how much memory it came to. Writes ``results/hostile_headers.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import environment

RESULTS: Final = Path(__file__).parent / "results" / "hostile_headers.json"
HEADER_BYTES: Final = 100_000_000
PARTS: Final = 10_000
READERS: Final = ("weightlift", "weightlift without its library", "safetensors")

FORMS: Final = {
    "ordinary tensors": ("{", '"#":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', "}"),
    "tensors as lists": ("{", '"#":["U8",[0],[0,0]]', "}"),
    "tensors as lists, one name": ("{", '"a":["U8",[0],[0,0]]', "}"),
    "ordinary tensors, one name": ("{", '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', "}"),
    "data types in objects": ("{", '"#":[{"U8":null},[0],[0,0]]', "}"),
    "fields in another order": ("{", '"#":{"shape":[0],"data_offsets":[0,0],"dtype":"U8"}', "}"),
    "escapes everywhere": ("{", r'"\u0061#":{"\u0064type":"\u0055\u0038","shap\u0065":[0],"data_offsets":[0,0]}', "}"),
    "ignored fields": ("{", '"#":{"x":[[],{"y":1}],"dtype":"U8","shape":[0],"data_offsets":[0,0],"z":null}', "}"),
    "one ignored list": ('{"a":{"x":[0', ",[[],1]", '],"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "one shape": ('{"a":{"dtype":"U8","shape":[0', ",1", '],"data_offsets":[0,0]}}'),
    "positions in disorder": ("{", '"#":["U8",[@],[!,!]]', "}"),
    "metadata, one name": ('{"__metadata__":{"x":""', ',"a":""', "}}"),
    "metadata, one name with escapes": ('{"__metadata__":{"x":""', r',"\ud83d\ude00":"\n"', "}}"),
    "metadata, many names": ('{"__metadata__":{"x":""', ',"#":""', "}}"),
}


def write(path: Path, form: str, size: int, *, broken: bool) -> None:
    """Write a file that is nothing but a header of that form and size, with a mistake at its very end if ``broken``."""
    begin, unit, end = FORMS[form]
    joined = "" if unit.startswith(",") else ","
    parts, length, number = [begin], len(begin), 0
    room = size - len(end) - 1
    while True:
        items = []
        for _ in range(PARTS):
            place = str((number * 7919) % 1_000_003)
            items.append(unit.replace("#", f"{number:x}").replace("@", "0").replace("!", place))
            number += 1
        part = joined.join(items)
        if length + len(part) + 1 > room:
            break
        parts.append(part if not joined or len(parts) == 1 else joined + part)
        length += len(parts[-1])
    text = ("".join(parts) + ("!" if broken else "") + end).encode()
    text += b" " * (size - len(text))
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def read(reader: str, path: str) -> dict[str, Any]:
    """Open a file in this process and say what came of it."""
    refused = ""
    if reader == "safetensors":
        import safetensors

        def call() -> int:
            with safetensors.safe_open(path, framework="np") as file:
                return len(file.keys())
    else:
        from weightlift.formats import compiled, describe

        if reader != "weightlift":
            compiled.library = lambda: None  # type: ignore[assignment]

        def call() -> int:
            return len(describe(path))

    before, begin, begun = peak_bytes(), time.perf_counter(), time.process_time()
    try:
        tensors: int | None = call()
    except Exception as err:  # noqa: BLE001 - whatever a reader refuses with
        tensors, refused = None, type(err).__name__
    return {
        "seconds": round(time.perf_counter() - begin, 2),
        "processor_seconds": round(time.process_time() - begun, 2),
        "growth_bytes": peak_bytes() - before,
        "tensors": tensors,
        "refused": refused,
    }


def peak_bytes() -> int:
    """Most memory that this process has had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", nargs=2, metavar=("READER", "PATH"), help=argparse.SUPPRESS)
    parser.add_argument("--form", action="append", choices=list(FORMS), help="only this form; may be repeated")
    parser.add_argument("--reader", action="append", choices=READERS, help="only this reader; may be repeated")
    parser.add_argument("--bytes", type=int, default=HEADER_BYTES, help="length of the headers (default: the limit)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.read:
        print(json.dumps(read(*chosen.read)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="weightlift-hostile-headers-") as folder:
        path = Path(folder) / "model.safetensors"
        taken = environment.record(Path(folder))
        for form in chosen.form or FORMS:
            for broken in (False, True):
                write(path, form, chosen.bytes, broken=broken)
                name = f"{form}, broken at the end" if broken else form
                for reader in chosen.reader or READERS:
                    words = [sys.executable, __file__, "--read", reader, str(path)]
                    done = subprocess.run(words, capture_output=True, text=True, check=True)
                    result = json.loads(done.stdout)
                    results.setdefault(name, {})[reader] = result
                    growth = result["growth_bytes"] / 1e6
                    times = f"{result['seconds']:6.2f} s {result['processor_seconds']:6.2f} s at work"
                    print(f"{name:<50} {reader:<30} {times} {growth:8.0f} MB {result['refused']}", flush=True)
    record = {"schema": 1, "environment": taken, "header_bytes": chosen.bytes, "headers": results}
    chosen.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
