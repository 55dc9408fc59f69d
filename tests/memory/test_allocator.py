"""The replay of PyTorch's CUDA caching allocator, on sequences worked out by hand from the rules of its source."""

import random

import pytest

from toolkit.memory.cuda.allocator import Allocator, OutOfMemory

KIB, MIB = 1 << 10, 1 << 20


def test_a_request_is_rounded_up_to_512_bytes_and_zero_bytes_allocate_nothing():
    allocator = Allocator()
    assert allocator.malloc(0) is None
    allocator.malloc(1)
    allocator.malloc(513)
    assert (allocator.allocated, allocator.requested, allocator.slack) == (512 + 1024, 514, 1022)


def test_small_requests_share_a_segment_of_2_mib():
    allocator = Allocator()
    for _ in range(2):
        allocator.malloc(1 * MIB)  # exactly 1 MiB is still small
    assert allocator.reserved == 2 * MIB
    allocator.malloc(512)
    assert allocator.reserved == 4 * MIB


@pytest.mark.parametrize(
    ("request_bytes", "segment_bytes"),
    [
        (1 * MIB + 1, 20 * MIB),
        (10 * MIB - 1024, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_a_large_request_reserves_20_mib_below_10_mib_and_otherwise_a_multiple_of_2_mib(request_bytes, segment_bytes):
    allocator = Allocator()
    allocator.malloc(request_bytes)
    assert allocator.reserved == segment_bytes


def test_a_large_block_keeps_a_remainder_of_up_to_1_mib_as_slack():
    allocator = Allocator()
    allocator.malloc(33 * MIB)  # a segment of 34 MiB: 1 MiB is left, which is not more than 1 MiB
    assert (allocator.allocated, allocator.slack) == (34 * MIB, 1 * MIB)
    allocator.malloc(33 * MIB - 512)  # 1 MiB + 512 bytes are left: split off
    assert allocator.allocated == 34 * MIB + 33 * MIB - 512


def test_a_small_block_is_split_down_to_512_bytes():
    allocator = Allocator()
    first = allocator.malloc(1024)
    second = allocator.malloc(512)
    allocator.free(first)
    allocator.malloc(512)  # takes half of the first block, the best fit
    allocator.malloc(512)  # and the other half
    assert (allocator.allocated, allocator.reserved) == (3 * 512, 2 * MIB)
    assert second.address == 1024 + first.address


def test_the_smallest_cached_block_that_fits_is_taken():
    allocator = Allocator()
    wide, narrow = allocator.malloc(40 * MIB), allocator.malloc(30 * MIB)
    allocator.free(wide)
    allocator.free(narrow)
    assert allocator.malloc(28 * MIB).address == narrow.address
    assert allocator.malloc(28 * MIB).address == wide.address
    assert allocator.reserved == 70 * MIB


def test_among_equal_blocks_the_lowest_address_is_taken_which_is_in_the_newest_segment():
    allocator = Allocator()
    first, second = allocator.malloc(12 * MIB), allocator.malloc(12 * MIB)
    assert second.address < first.address
    allocator.free(second)
    allocator.free(first)
    assert allocator.malloc(12 * MIB).address == second.address


def test_free_neighbours_merge_but_segments_never_do():
    allocator = Allocator()
    parts = [allocator.malloc(4 * MIB) for _ in range(5)]  # one segment of 20 MiB
    assert allocator.reserved == 20 * MIB
    for i in (0, 2, 1):  # the middle block merges on both sides
        allocator.free(parts[i])
    assert allocator.malloc(12 * MIB).address == parts[0].address
    assert allocator.reserved == 20 * MIB
    allocator.malloc(9 * MIB)  # 8 MiB are still allocated, so a second segment is needed
    assert allocator.reserved == 40 * MIB


def test_empty_cache_gives_back_only_completely_free_segments():
    allocator = Allocator()
    kept, freed, separate = allocator.malloc(4 * MIB), allocator.malloc(4 * MIB), allocator.malloc(64 * MIB)
    allocator.free(freed)
    allocator.free(separate)
    assert allocator.reserved == 84 * MIB
    allocator.empty_cache()
    assert (allocator.reserved, allocator.cached) == (20 * MIB, 16 * MIB)
    assert allocator.peak_reserved == 84 * MIB
    allocator.reset_peaks()
    assert allocator.peak_reserved == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_a_full_device_gives_the_cache_back_and_tries_again_before_it_raises():
    allocator = Allocator(capacity=100 * MIB)
    cached = allocator.malloc(60 * MIB)
    allocator.free(cached)
    allocator.malloc(80 * MIB)  # 60 + 80 exceeds 100, so the cached segment is given back first
    assert (allocator.reserved, allocator.retries) == (80 * MIB, 1)
    with pytest.raises(OutOfMemory, match=f"{30 * MIB} bytes with {80 * MIB} of {100 * MIB}"):
        allocator.malloc(30 * MIB)


def test_an_expandable_segment_grows_by_pages_of_20_mib_and_leaves_no_slack():
    allocator = Allocator(expandable_segments=True)
    first = allocator.malloc(33 * MIB)  # two pages of 20 MiB; 7 MiB are split off
    assert (allocator.reserved, allocator.allocated) == (40 * MIB, 33 * MIB)
    second = allocator.malloc(30 * MIB)  # grows the open end by 23 MiB, rounded up to 2 pages
    assert (allocator.reserved, second.address) == (80 * MIB, first.address + 33 * MIB)
    allocator.malloc(1 * MIB)  # small: its own segment, with pages of 2 MiB
    assert allocator.reserved == 82 * MIB


def test_an_expandable_segment_reuses_a_hole_before_it_uses_the_open_end():
    allocator = Allocator(expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    allocator.malloc(5 * MIB)  # 35 of 40 MiB: the open end is a block of 5 MiB
    allocator.free(first)
    # Both holes fit. The open end (5 MiB) is smaller, but it counts together with the address space behind it.
    assert allocator.malloc(4 * MIB).address == first.address


def test_empty_cache_unmaps_the_whole_pages_of_an_expandable_segment_and_fills_the_hole_first():
    allocator = Allocator(expandable_segments=True)
    first, last = allocator.malloc(50 * MIB), allocator.malloc(5 * MIB)  # 3 pages
    allocator.free(first)
    allocator.empty_cache()  # pages 0 and 1 are completely free; page 2 has 10 MiB free, and 5 MiB behind `last`
    assert (allocator.reserved, allocator.allocated) == (20 * MIB, 5 * MIB)
    assert allocator.malloc(25 * MIB).address == first.address
    assert allocator.reserved == 40 * MIB + 20 * MIB
    allocator.free(last)


@pytest.mark.parametrize("expandable", [False, True])
def test_totals_are_consistent_after_any_sequence(expandable):
    rng = random.Random(7)
    allocator = Allocator(expandable, capacity=2 << 30)
    live = []
    for _ in range(5000):
        if live and rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        else:
            try:
                live.append(allocator.malloc(int(2 ** rng.uniform(0, 27))))
            except OutOfMemory:
                while live:
                    allocator.free(live.pop())
        if rng.random() < 0.01:
            allocator.empty_cache()
        assert allocator.allocated == sum(block.size for block in live)
        assert allocator.requested == sum(block.requested for block in live)
        assert allocator.allocated <= allocator.reserved <= 2 << 30
    while live:
        allocator.free(live.pop())
    allocator.empty_cache()
    assert (allocator.allocated, allocator.requested, allocator.reserved) == (0, 0, 0)
