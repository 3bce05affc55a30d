"""Timelines stay small and lose no extreme."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from weightlift.samples import POINTS_MAX, Sample, Timeline

NOTHING = Sample(0.0, 0, 0, 0, None, None, None, 0, None, None, None, None, None, None, None, 0, 0)


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.integers(-9, 1 << 40)), st.one_of(st.none(), st.integers(0, 1 << 40))),
        max_size=200,
    ),
    st.sampled_from([2, 4, 16]),
)
def test_extremes_order_and_ends_survive(figures: list[tuple[int | None, int | None]], points_max: int) -> None:
    timeline = Timeline(points_max)
    samples = [
        NOTHING._replace(seconds=float(index), landed_bytes=index, anonymous_bytes=used, available_bytes=left)
        for index, (used, left) in enumerate(figures)
    ]
    for sample in samples:
        timeline.add(sample)
        assert len(timeline.samples) <= points_max
    points = timeline.samples
    assert [point.seconds for point in points] == sorted({point.seconds for point in points})
    assert [point.landed_bytes for point in points] == [int(point.seconds) for point in points]
    if samples:
        assert points[-1].seconds == samples[-1].seconds

    def known(values: list[int | None]) -> list[int]:
        return [value for value in values if value is not None]

    for choose, name in ((max, "anonymous_bytes"), (min, "available_bytes")):
        kept, seen = (known([getattr(entry, name) for entry in entries]) for entries in (points, samples))
        assert choose(kept, default=None) == choose(seen, default=None)


def test_a_long_load_fills_its_points_evenly() -> None:
    timeline = Timeline()
    for index in range(10_000):
        timeline.add(NOTHING._replace(seconds=float(index)))
    seconds = [point.seconds for point in timeline.samples]
    assert POINTS_MAX / 2 <= len(seconds) <= POINTS_MAX
    steps = [after - before for before, after in pairwise(seconds)]
    assert max(steps[:-1]) == min(steps[:-1]) == 64
