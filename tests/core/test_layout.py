"""Properties of layouts on random checkpoints: every tensor has a place, aligned and its own."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings

from weightlift.layout import LARGE_TENSOR_BYTES, SLAB_BYTES, Span, copy_table, lay_out
from weightlift.operations import COPY_FIELDS
from weightlift.testing.strategies import describe_lengths, selections
from weightlift.units import PAGE_BYTES, align_down, align_up

if TYPE_CHECKING:
    from weightlift.description import Description

REGION = 1 << 40
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def alignment_of(description: Description, row: int) -> int:
    return description.dtype(row).alignment


@QUICK
@given(selections())
def test_every_selected_tensor_has_a_place_of_its_own(selection: tuple[Description, list[int]]) -> None:
    description, rows = selection
    layout = lay_out(description, rows)
    taken = sorted(
        (layout.places[index], layout.places[index] + description.lengths[row])
        for index, row in enumerate(rows)
        if description.lengths[row]
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(taken)), "tensors overlap"
    assert not taken or taken[-1][1] <= layout.region_bytes
    assert layout.region_bytes % PAGE_BYTES == 0
    for index, row in enumerate(rows):
        assert layout.places[index] % alignment_of(description, row) == 0 or not description.lengths[row]
    # Whole pages around runs are all the memory that the layout may waste.
    waste = layout.region_bytes - description.bytes_of(rows)
    assert waste <= PAGE_BYTES + sum(
        64 * (span.end - span.first) + 2 * PAGE_BYTES if span.packed else 2 * PAGE_BYTES for span in layout.spans
    )


@QUICK
@given(selections())
def test_spans_read_every_selected_byte_once_into_its_place(selection: tuple[Description, list[int]]) -> None:
    description, rows = selection
    layout = lay_out(description, rows)
    seen: list[int] = []
    for span in layout.spans:
        table = copy_table(description, layout, span, REGION).numbers
        entries = [tuple(table[n : n + COPY_FIELDS]) for n in range(0, len(table), COPY_FIELDS)]
        assert entries == sorted(entries)
        inside = [index for index in range(span.first, span.end) if description.lengths[rows[index]]]
        seen += inside
        assert inside
        for index in inside:
            row = rows[index]
            offset, length = description.offsets[row], description.lengths[row]
            assert description.shard_indexes[row] == span.shard
            assert span.offset <= offset
            assert offset + length <= span.offset + span.length
            covering = [entry for entry in entries if entry[0] <= offset and offset + length <= entry[0] + entry[1]]
            assert [entry[2] + offset - entry[0] for entry in covering] == [REGION + layout.places[index]]
        if not span.packed:
            assert sum(description.lengths[rows[index]] for index in inside) == span.length, "only what was selected"
    assert seen == [index for index, row in enumerate(rows) if description.lengths[row]]


@QUICK
@given(selections())
def test_mirrored_spans_are_congruent_and_alone_on_their_pages(selection: tuple[Description, list[int]]) -> None:
    description, rows = selection
    layout = lay_out(description, rows)
    others = sorted(
        (layout.places[index], layout.places[index] + description.lengths[rows[index]], span)
        for span in layout.spans
        for index in range(span.first, span.end)
        if description.lengths[rows[index]]
    )
    for span in layout.spans:
        assert not (span.packed and span.mirrored)
        if not span.mirrored:
            continue
        assert span.place % PAGE_BYTES == span.offset % PAGE_BYTES
        first, end = align_down(span.place, PAGE_BYTES), align_up(span.place + span.length, PAGE_BYTES)
        assert end <= layout.region_bytes
        assert not [place for place in others if place[2] != span and place[0] < end and first < place[1]]


@QUICK
@given(selections())
def test_groups_share_out_the_tensors(selection: tuple[Description, list[int]]) -> None:
    description, rows = selection
    layout = lay_out(description, rows)
    owned: list[int] = []
    for group in layout.groups:
        inside = [index for index in range(group.first, group.end) if description.lengths[rows[index]]]
        owned += inside
        assert inside
        sizes = [description.lengths[rows[index]] for index in inside]
        assert max(sizes) < LARGE_TENSOR_BYTES or len(inside) == 1, "a large tensor owns its storage alone"
        assert group.length <= SLAB_BYTES or len(inside) == 1
        for index, size in zip(inside, sizes, strict=True):
            assert group.place <= layout.places[index]
            assert layout.places[index] + size <= group.place + group.length
    assert owned == [index for index, row in enumerate(rows) if description.lengths[row]]


def test_a_checkpoint_without_tensors_needs_nothing() -> None:
    description = describe_lengths([(8, [("F32", 0)])])
    layout = lay_out(description, [0])
    assert (layout.spans, layout.groups, layout.region_bytes, list(layout.places)) == ((), (), 0, [0])


def test_empty_tensors_at_the_edges_of_shards() -> None:
    shard = [("F64", 0), ("F32", 30_000), ("U8", 0), ("F16", 500_000), ("F64", 0)]
    description = describe_lengths([(5000, shard), (16, shard), (12_000, shard)])
    layout = lay_out(description, range(15))
    assert sum(span.length for span in layout.spans) == 3 * (120_000 + 1_000_000) == description.bytes_of(range(15))


def test_an_ordinary_file_is_one_mirrored_span() -> None:
    description = describe_lengths([(4096 + 64, [("F32", 100_000), ("F16", 5), ("F64", 200_000), ("U8", 3)])])
    layout = lay_out(description, range(4))
    # Behind five halves the doubles are two bytes off, so they start a span of their own.
    assert [(span.offset, span.length, span.mirrored) for span in layout.spans] == [
        (4160, 400_010, True),
        (404_170, 1_600_003, False),
    ]
    aligned = describe_lengths([(4096 + 64, [("F64", 200_000), ("F32", 100_000), ("F16", 5), ("U8", 3)])])
    (span,) = lay_out(aligned, range(4)).spans
    assert span == Span(0, 4160, 2_000_013, 64, True, 0, 4, packed=False)
