"""Gate: ``import weightlift`` is quick and pulls in nothing heavy.

Every measurement is a fresh process. The cost of the import is the time between two clock readings around it, so the
interpreter's own start does not count; the median of several processes is judged.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Final

SECONDS_MAX: Final = 0.050
PROCESSES: Final = 9
HEAVY: Final = ("torch", "numpy", "ml_dtypes", "safetensors", "msgspec", "rich", "xxhash")
PROBE: Final = """
import sys, time
start = time.perf_counter()
import weightlift
seconds = time.perf_counter() - start
import json
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


def probe() -> tuple[float, list[str]]:
    """Import weightlift in a fresh process: seconds it took, and the modules loaded then."""
    finished = subprocess.run([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(finished.stdout)
    return answer["seconds"], answer["modules"]


def main() -> int:
    """Print the verdict; 1 if the import is slow or loads a heavy package."""
    _, modules = probe()  # also writes the byte code that the timed runs read
    heavy = [name for name in HEAVY if name in modules]
    if heavy:
        print(f"import: `import weightlift` loads {', '.join(heavy)}; `python -X importtime` shows who asks for it")
    seconds = statistics.median(probe()[0] for _ in range(PROCESSES))
    verdict = "within" if seconds < SECONDS_MAX else "above"
    print(
        f"import: {seconds * 1e3:.1f} ms, median of {PROCESSES} fresh processes, {verdict} the limit of "
        f"{SECONDS_MAX * 1e3:.0f} ms; {len(modules)} modules loaded"
    )
    return 1 if heavy or seconds >= SECONDS_MAX else 0


if __name__ == "__main__":
    sys.exit(main())
