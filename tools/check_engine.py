"""Gate for the C engine: it compiles without a warning, and clean under sanitizers.

``warnings`` compiles it with many warnings as errors, and once more through gcc's static analyser. ``build`` makes one
library per sanitizer under ``build/sanitize``. ``run`` builds them and repeats the tests marked ``native`` on each,
``sample`` those of them that take little time. Either first has each sanitizer find planted mistakes in a library that
is loaded in the same way, since one that is loaded too late, or not at all, finds nothing and lets the engine look
clean.

What cannot be checked on a machine (no C compiler, no sanitizer runtime) is said, in a line that starts with
``NOT CHECKED``, and does not fail unless ``--require`` is given.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = ROOT / "src" / "weightlift"
SOURCES: Final = (PACKAGE / "engines" / "_engine.c", PACKAGE / "formats" / "_values.c")
BUILD: Final = ROOT / "build" / "sanitize"
BASE: Final = ("-std=c11", "-fPIC", "-pthread", "-fvisibility=hidden")
WARNINGS: Final = (
    *("-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wundef", "-Wwrite-strings", "-Wcast-qual", "-Wpointer-arith"),
    *("-Wstrict-prototypes", "-Wold-style-definition", "-Wformat=2", "-Wimplicit-fallthrough", "-Wconversion"),
    "-Werror",
)
EXIT_NOTHING_COLLECTED: Final = 5  # pytest's own

EXPORTED: Final = '__attribute__((visibility("default")))'
CALL: Final = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).mistake(4)"
"""Calls a planted mistake. The argument keeps the compiler from seeing the mistake and warning of it."""

LOAD: Final = """
import sys
from weightlift.engines.native import native_library
library = native_library()
sys.exit(library if isinstance(library, str) else 0)
"""
"""Loads the engine as the tests will, which skip themselves where that fails."""

BEYOND_THE_END: Final = """
#include <stdlib.h>
int mistake(int count) {
    int *numbers = calloc((size_t)count, sizeof *numbers), beyond = numbers[count];
    free(numbers);
    return beyond;
}
"""
TOO_FAR_A_SHIFT: Final = """
int mistake(int count) { return 1 << (count * 8); }
"""
UNLOCKED_COUNTER: Final = """
#include <pthread.h>
#include <stdatomic.h>
static int counter;
static atomic_int counted;
static void *count_up(void *unused) {
    counter++;
    atomic_store_explicit(&counted, 1, memory_order_relaxed);
    return unused;
}
int mistake(int count) {
    pthread_t thread;
    if (pthread_create(&thread, 0, count_up, 0)) return 0;
    while (!atomic_load_explicit(&counted, memory_order_relaxed)) continue;
    counter += count;
    pthread_join(thread, 0);
    return counter;
}
"""
"""A race in which one thread always comes after the other, though nothing orders them for the language.

A thread sanitizer can miss two accesses at the very same moment, and here such a moment never comes: a relaxed flag
lets the second wait for the first and says nothing about the counter.
"""


@dataclass(frozen=True, slots=True)
class Sanitizer:
    """One instrumented build.

    Attributes:
        name: what it is called here.
        flags: what the compiler needs.
        runtime: the runtime's name as gcc and clang spell it within their library names.
        environment: options for the instrumented process.
        mistakes: by the words it is reported in, C code with a mistake that must be found.
        sample: the tests that every change has to pass; all of them take minutes.
        unsuited: tests that judge this process's memory, to which the sanitizer's own is added.
    """

    name: str
    flags: tuple[str, ...]
    runtime: str
    environment: dict[str, str]
    mistakes: dict[str, str]
    sample: tuple[str, ...]
    unsuited: tuple[str, ...] = ()


SANITIZERS: Final = (
    # The interpreter keeps memory until it exits, so leaks at exit say nothing of the engine.
    Sanitizer(
        "address",
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        "asan",
        {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
        {"heap-buffer-overflow": BEYOND_THE_END, "shift exponent 32 is too large": TOO_FAR_A_SHIFT},
        ("tests/engines", "tests/formats/test_values.py"),
        ("tests/core/test_reach.py",),
    ),
    Sanitizer(
        "thread",
        ("-fsanitize=thread",),
        "tsan",
        {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
        {"data race": UNLOCKED_COUNTER},
        ("tests/engines/test_native.py::TestNativeEngine",),
        ("tests/core/test_load.py::test_a_tensor_of_eight_budgets_loads_within_one", "tests/core/test_reach.py"),
    ),
)


def say(text: str) -> None:
    """Print at once, so that the line stands where it belongs among the compiler's own."""
    print(text, flush=True)


def find_compiler() -> list[str] | None:
    """The C compiler as a command: ``$CC``, else the first of cc, gcc and clang that is installed."""
    named = os.environ.get("CC")
    for command in [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return command
    return None


def is_clang(compiler: list[str]) -> bool:
    """Whether the compiler is clang, whatever it is called."""
    banner = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return "clang" in banner


def compile_source(compiler: list[str], flags: list[str], sources: Sequence[Path], output: Path) -> bool:
    """Compile ``sources`` into ``output``; the compiler's own messages go to stderr."""
    command = [*compiler, *BASE, *flags, "-o", str(output), *map(str, sources)]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        say(f"failed: {shlex.join(command)}")
    return finished.returncode == 0


def check_warnings(compiler: list[str]) -> bool:
    """Compile with warnings as errors, then with the static analyser where the compiler has it."""
    output = BUILD / "engine.o"
    clean = all(compile_source(compiler, [*WARNINGS, "-O2", "-c"], [source], output) for source in SOURCES)
    if is_clang(compiler):
        say("NOT CHECKED: static analysis of the engine, because -fanalyzer is gcc's")
    else:
        analysed = [*WARNINGS, "-O1", "-fanalyzer", "-c"]
        clean &= all(compile_source(compiler, analysed, [source], output) for source in SOURCES)
    say(f"engine: warnings as errors: {'clean' if clean else 'FAILED'}")
    return clean


def find_runtime(compiler: list[str], sanitizer: Sanitizer) -> Path | None:
    """The sanitizer's shared runtime, which has to be in the process before Python is."""
    clang_name = f"libclang_rt.{sanitizer.runtime}-{platform.machine()}.so"
    name = clang_name if is_clang(compiler) else f"lib{sanitizer.runtime}.so"
    command = [*compiler, f"-print-file-name={name}"]
    answer = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return answer.resolve() if answer.is_absolute() and answer.exists() else None


def build_library(compiler: list[str], sanitizer: Sanitizer, sources: Sequence[Path], output: Path) -> bool:
    """Build a library with one sanitizer."""
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", "-shared", *sanitizer.flags]
    if is_clang(compiler):
        flags.append("-shared-libsan")
    return compile_source(compiler, flags, sources, output)


def fixed_addresses() -> list[str]:
    """A prefix that starts a command without address randomisation, empty where that is not to be had.

    Older thread sanitizers refuse to start where a kernel randomises more bits of an address than they knew of.
    """
    prefix = ["setarch", platform.machine(), "-R"]
    if not shutil.which(prefix[0]):
        return []
    return [] if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode else prefix


def python_with(runtime: Path, sanitizer: Sanitizer, **more: str) -> list[str]:
    """A command that starts this interpreter with a sanitizer's runtime in it, and in nothing before it."""
    variables = {**sanitizer.environment, "LD_PRELOAD": str(runtime), **more}
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        # With the system's allocator Python's tables have red zones too, and the engine is given many of them. Without
        # the interpreter lock Python has only its own.
        variables["PYTHONMALLOC"] = "malloc"
    return [*fixed_addresses(), "env", *(f"{name}={value}" for name, value in variables.items()), sys.executable]


def finds_mistakes(compiler: list[str], runtime: Path, sanitizer: Sanitizer) -> bool:
    """Whether a sanitizer finds what it is for, in a library that Python loads as it loads the engine."""
    for words, code in sanitizer.mistakes.items():
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "mistake.c"), Path(folder, "mistake.so")
            source.write_text(code.replace("int mistake", f"{EXPORTED} int mistake"))
            if not build_library(compiler, sanitizer, [source], library):
                return False
            command = [*python_with(runtime, sanitizer), "-c", CALL, str(library)]
            finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode == 0 or words not in finished.stderr:
            say(f"engine: {sanitizer.name} sanitizer: did not find a planted mistake ({words}); it said:")
            say(finished.stderr[-2000:] or f"nothing, and exit status {finished.returncode}")
            return False
    return True


def run_tests(library: Path, runtime: Path, sanitizer: Sanitizer, tests: Sequence[str]) -> bool:
    """Repeat the tests of the native engine, as far as they are under ``tests``, with the instrumented library."""
    python = python_with(runtime, sanitizer, WEIGHTLIFT_ENGINE_LIBRARY=str(library))
    if subprocess.run([*python, "-c", LOAD], cwd=ROOT, check=False).returncode:
        return False
    # Uncaptured: a sanitizer writes its findings to the descriptor of stderr and ends the process.
    command = [*python, "-m", "pytest", "-q", "-m", "native", "--capture=no", "-p", "no:cacheprovider", *tests]
    command += [f"--deselect={test}" for test in sanitizer.unsuited]
    finished = subprocess.run(command, cwd=ROOT, check=False)
    if finished.returncode == EXIT_NOTHING_COLLECTED:
        say("engine: no test is marked `native`, so nothing ran")
    return finished.returncode == 0


def check_sanitizer(compiler: list[str], sanitizer: Sanitizer, tests: Sequence[str]) -> bool | None:
    """Build, and run tests if there are any; ``None`` if this machine cannot."""
    runtime = find_runtime(compiler, sanitizer)
    if runtime is None:
        say(f"NOT CHECKED: {sanitizer.name} sanitizer, because {compiler[0]} has no lib{sanitizer.runtime} here")
        return None
    library = BUILD / f"libweightlift_engine-{sanitizer.name}.so"
    clean = build_library(compiler, sanitizer, SOURCES, library)
    if tests and clean:
        clean = finds_mistakes(compiler, runtime, sanitizer) and run_tests(library, runtime, sanitizer, tests)
    say(f"engine: {sanitizer.name} sanitizer, {'tests' if tests else 'build'}: {'clean' if clean else 'FAILED'}")
    return clean


def tests_of(sanitizer: Sanitizer, steps: Sequence[str]) -> Sequence[str]:
    """Which tests the steps asked for repeat under a sanitizer."""
    if "run" in steps:
        return ("tests",)
    return sanitizer.sample if "sample" in steps else ()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="check the C engine")
    parser.add_argument("steps", nargs="+", choices=["warnings", "build", "sample", "run"])
    parser.add_argument("--require", action="store_true", help="fail where something cannot be checked")
    parser.add_argument("--only", choices=[sanitizer.name for sanitizer in SANITIZERS], help="one sanitizer")
    return parser.parse_args()


def main() -> int:
    """Run the steps asked for; 1 if one failed."""
    arguments = parse_arguments()
    compiler = find_compiler()
    if compiler is None:
        say("NOT CHECKED: the C engine, because there is no C compiler ($CC, cc, gcc, clang)")
        return 1 if arguments.require else 0
    BUILD.mkdir(parents=True, exist_ok=True)
    results: list[bool | None] = []
    if "warnings" in arguments.steps:
        results.append(check_warnings(compiler))
    if {"build", "sample", "run"}.intersection(arguments.steps):
        results += [
            check_sanitizer(compiler, sanitizer, tests_of(sanitizer, arguments.steps))
            for sanitizer in SANITIZERS
            if arguments.only in (None, sanitizer.name)
        ]
    failed = False in results or (arguments.require and None in results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
