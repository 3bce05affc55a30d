"""A closer look at one load, for whoever asks for it: a trace of every step, and samples at short intervals."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, field

from weightlift.steps import STEPS_MAX, Steps


class Recording(Struct, kw_only=True):
    """What to record of a load, and afterwards what was; give each load one of its own as ``recording=``.

    Attributes:
        steps_max: how many steps of the workers to keep, the last ones; 0 keeps none. Costs some 50 bytes each beside
            the host-memory budget (with the Python engine some 300).
        sample_seconds: how often to look at memory.
        steps: the steps, once the load has ended, by error too unless a worker got stuck.
        steps_begin: seconds from the start of the load to the time that steps count from.
        phases: begin and end of every phase, in seconds since the start of the load.
        shards: the file of every shard that steps name.
    """

    steps_max: int = STEPS_MAX
    sample_seconds: float = 0.01
    steps: Steps | None = None
    steps_begin: float = 0.0
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    shards: Sequence[str] = ()
