"""What watching costs: ``python benchmarks/monitoring.py`` writes ``benchmarks/results/monitoring.json``.

The quickest load there is (a file in the page cache, read and discarded) runs as it is, with a closer look (samples
every 10 ms and a trace of every step), and with every figure taken from a constant instead of the system. The three
alternate; ratios are taken within a round. Beside them stands what one look costs by the clock, which a noisy machine
hides less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import environment
from states import CacheState, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).resolve().parent / "results" / "monitoring.json"
SHARE_AT_MOST = 0.01
LOOKS = 2000


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4.0, help="GiB of the checkpoint (default 4)")
    parser.add_argument("--rounds", type=int, default=25, help="runs of each (default 25)")
    parser.add_argument("--folder", type=Path, help="make the checkpoint here instead of in the temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file with the results")
    return parser.parse_args()


def ways(path: Path) -> dict[str, Callable[[], None]]:
    """The load as it is, watched more closely, and not watched."""
    import weightlift
    from weightlift import monitor
    from weightlift.host.gauges import HostGauges

    figures = HostGauges().read(fresh=True)

    class Constant:
        """Gauges that are not looked at."""

        @staticmethod
        def read(**_: Any) -> Any:
            """The same figures every time."""
            return figures

    def load(**options: Any) -> None:
        weightlift.load(path, device="null", method="buffered", cache="keep", **options)

    def unwatched() -> None:
        with mock.patch.object(monitor, "HostGauges", Constant):
            load()

    return {
        "unwatched": unwatched,
        "as it is": load,
        "recorded": lambda: load(recording=weightlift.Recording()),
    }


def seconds_per_look() -> float:
    """What one look at the figures costs, by the clock; the median over tenths."""
    from weightlift.host.gauges import HostGauges

    read, parts = HostGauges().read, []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(LOOKS // 10):
            read()
        parts.append((time.perf_counter() - start) / (LOOKS // 10))
    return statistics.median(parts)


def main() -> None:
    """Measure in alternating rounds and write the results."""
    from weightlift.supervision import SAMPLE_SECONDS
    from weightlift.testing import llama_specs, write_checkpoint

    chosen = arguments()
    with tempfile.TemporaryDirectory(prefix="weightlift-monitoring-", dir=chosen.folder) as folder:
        path = write_checkpoint(Path(folder) / "model.safetensors", llama_specs(int(chosen.size * (1 << 30))))
        taken = environment.record(Path(folder))
        prepare([str(path)], CacheState.WARM)
        contestants = ways(path)
        runs: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(chosen.rounds + 1):
            shift = number % len(contestants)
            names = [*contestants][shift:] + [*contestants][:shift]
            for name in names:
                start = time.perf_counter()
                contestants[name]()
                if number:  # the first round only brings everything up
                    runs[name].append(time.perf_counter() - start)
    look = seconds_per_look()
    ratios = {
        name: statistics.median(mine / without for mine, without in zip(times, runs["unwatched"], strict=True))
        for name, times in runs.items()
    }
    result = {
        "schema": 1,
        "taken": taken,
        "rounds": chosen.rounds,
        "seconds": {name: {"median": statistics.median(times), "runs": times} for name, times in runs.items()},
        "ratio_to_unwatched": ratios,
        "seconds_per_look": look,
        "share_of_one_processor": look / SAMPLE_SECONDS,
        "share_at_most": SHARE_AT_MOST,
        "reached": look / SAMPLE_SECONDS <= SHARE_AT_MOST,
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"one look: {look * 1e6:.0f} µs every {SAMPLE_SECONDS * 1e3:.0f} ms, {look / SAMPLE_SECONDS:.2%} of a processor"
    )
    for name, ratio in ratios.items():
        print(f"{name:12} {statistics.median(runs[name]):.3f} s, {ratio - 1:+.2%} against unwatched")


if __name__ == "__main__":
    main()
