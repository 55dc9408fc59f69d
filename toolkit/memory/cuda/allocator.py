"""PyTorch's CUDA caching allocator, replayed in Python: how much memory a sequence of mallocs and frees makes it reserve.

`torch.cuda.max_memory_reserved()` is what runs out on a card, and it depends on the order of all allocations. This is
a model of `c10/cuda/CUDACachingAllocator.cpp` (PyTorch 2.14; the rules below are unchanged since 1.13, the 20 MiB
constant became the setting `large_segment_size_mb` in 2.10), for one device and one stream, without graphs:

- A request is rounded up to 512 bytes. Requests of at most 1 MiB live in the small pool, the others in the large pool.
- The smallest cached block that fits is taken; among equals, the one with the lowest address. If none fits, a new segment
  is reserved: 2 MiB for the small pool, 20 MiB for requests below 10 MiB, otherwise the request rounded up to 2 MiB. Each
  new segment lies below the older ones, as the driver maps them on Linux. Only with this order are the reserved peaks of
  the unquantized T4 runs (benchmarks/t4_accuracy.py) correct to the byte; with ascending addresses they are off by up to 9 %.
- A block is split if at least 512 bytes would be left in the small pool, or more than 1 MiB in the large pool. Otherwise
  the remainder stays inside the block as *slack* and counts as allocated.
- A freed block merges with its free neighbours in the segment. `empty_cache()`, or a full device, gives segments back to the
  device, but only those that are completely free.
- `expandable_segments:True` instead grows one segment per pool, by pages of 2 MiB (small) or 20 MiB (large). Blocks are
  split down to 512 bytes in both pools, and every free page is given back.

Not modelled: several streams (each has its own pools; training uses one stream), `max_split_size_mb`,
`garbage_collection_threshold`, `roundup_power2_divisions` (all off by default), private pools of CUDA graphs.
All sizes are bytes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.memory import trace

# A test compares these with the header of the installed PyTorch: seam "rules of the caching allocator".
MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_SIZE = 1 << 20  # kSmallSize: the largest request that the small pool serves
SMALL_BUFFER = 2 << 20  # kSmallBuffer: a segment, or a page, of the small pool
MIN_LARGE_ALLOC = 10 << 20  # kMinLargeAlloc: below it a large request reserves LARGE_BUFFER
LARGE_BUFFER = 20 << 20  # kLargeBuffer, now large_segment_size(): a segment, or a page, of the large pool
ROUND_LARGE = 2 << 20  # kRoundLarge: larger segments are multiples of it
_SEGMENT_STRIDE = LARGE_BUFFER << 20  # address distance between segments (20 TiB): aligned to pages, never exhausted
_TOP = _SEGMENT_STRIDE << 24  # the driver assigns addresses in descending order (see the module's docstring)


class OutOfMemory(MemoryError):
    """The replayed device is full: the request did not fit even after all cached segments were given back."""

    def __init__(self, requested_bytes: int, reserved_bytes: int, capacity_bytes: int) -> None:
        super().__init__(
            f"tried to allocate {requested_bytes} bytes with {reserved_bytes} of {capacity_bytes} bytes reserved"
        )
        self.requested_bytes = requested_bytes


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment: allocated, cached, or (expandable segments only) address space without memory."""

    address: int
    size: int  # bytes, slack included
    pool: _Pool
    requested: int = 0  # bytes that the caller asked for
    allocated: bool = False
    mapped: bool = True
    prev: Block | None = None
    next: Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        """The sort key of a pool: size, then address."""
        return (self.size, self.address)

    @property
    def expandable_size(self) -> int:
        """The size that the block can reach by mapping the address space behind it, in bytes."""
        after = self.next
        return self.size + (after.size if after is not None and not after.mapped else 0)


class _Pool:
    """The cached blocks of one kind, sorted by size and address, and the unmapped ones by address."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.page = SMALL_BUFFER if small else LARGE_BUFFER
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}
        self.unmapped: list[Block] = []

    def __iter__(self) -> Iterator[Block]:
        return iter([self._blocks[address] for _, address in self._keys])

    def add(self, block: Block) -> None:
        insort(self._keys, block.key)
        self._blocks[block.address] = block

    def remove(self, block: Block) -> None:
        del self._keys[bisect_left(self._keys, block.key)]
        del self._blocks[block.address]

    def take_best_fit(self, size: int, expandable: bool) -> Block | None:
        """Removes and returns the smallest cached block of at least `size` bytes, or None.

        With expandable segments a block counts with the size that it can reach, so the open end is used last.
        """
        i = bisect_left(self._keys, (size, -1))
        if i == len(self._keys):
            return None
        block = self._blocks[self._keys[i][1]]
        if expandable:
            for _, address in self._keys[i + 1 :]:
                other = self._blocks[address]
                if other.expandable_size >= block.expandable_size:
                    break
                block = other
        self.remove(block)
        return block


class Allocator:
    """Replays mallocs and frees; `allocated`, `reserved`, their peaks and `slack` can be read at any time.

    Args:
        expandable_segments: the allocator setting of the same name.
        capacity: bytes that the device can reserve (None: unlimited). A request beyond it first gives back the cached
            segments, as PyTorch does, and then raises `OutOfMemory`.
    """

    def __init__(self, expandable_segments: bool = False, capacity: int | None = None) -> None:
        self.expandable = expandable_segments
        self.capacity = capacity
        self.allocated = self.reserved = self.requested = 0
        self.peak_allocated = self.peak_reserved = 0
        self.retries = 0  # how often the cache was given back to serve a request
        self._small, self._large = _Pool(small=True), _Pool(small=False)
        self._next_address = _TOP

    @property
    def slack(self) -> int:
        """Bytes that count as allocated but were not requested: rounding, and remainders too small to split off."""
        return self.allocated - self.requested

    @property
    def cached(self) -> int:
        """Bytes that are reserved but not allocated."""
        return self.reserved - self.allocated

    def reset_peaks(self) -> None:
        """Like `torch.cuda.reset_peak_memory_stats()`: the peaks restart at the current values."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def malloc(self, size: int) -> Block | None:
        """Allocates `size` bytes and returns the handle for `free`; None for zero bytes.

        Raises:
            OutOfMemory: if the request does not fit within `capacity`.
        """
        if size == 0:
            return None
        rounded = max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)
        pool = self._small if rounded <= SMALL_SIZE else self._large
        block = pool.take_best_fit(rounded, self.expandable) or self._reserve(pool, rounded)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._reserve(pool, rounded)
            if block is None:
                raise OutOfMemory(size, self.reserved, self.capacity or 0)
        rest = block.size - rounded
        if rest >= MIN_BLOCK if pool.small or self.expandable else rest > SMALL_SIZE:
            remainder = Block(block.address + rounded, rest, pool, prev=block, next=block.next)
            if block.next is not None:
                block.next.prev = remainder
            block.next, block.size = remainder, rounded
            pool.add(remainder)
        block.allocated, block.requested = True, size
        self.requested += size
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Gives a block back to its pool, merged with its free neighbours."""
        if block is None:
            return
        assert block.allocated, "a block is freed once"
        block.allocated = False
        self.allocated -= block.size
        self.requested -= block.requested
        block.requested = 0
        self._merge(block, block.prev)
        self._merge(block, block.next)
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Gives all completely free segments (with expandable segments: pages) back to the device."""
        for pool in (self._large, self._small):
            for block in list(pool):
                if self.expandable:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _reserve(self, pool: _Pool, size: int) -> Block | None:
        """A new free block of at least `size` bytes, not yet in a pool, or None if the device is full."""
        if self.expandable:
            return self._expand(pool, size)
        segment = (
            SMALL_BUFFER
            if pool.small
            else LARGE_BUFFER
            if size < MIN_LARGE_ALLOC
            else -(-size // ROUND_LARGE) * ROUND_LARGE
        )
        if not self._grow(segment):
            return None
        block = Block(self._next_address, segment, pool)
        self._next_address -= _SEGMENT_STRIDE
        return block

    def _grow(self, size: int) -> bool:
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _expand(self, pool: _Pool, size: int) -> Block | None:
        """Maps pages after the first free part of the pool's segment that has room, until it holds `size` bytes."""
        if not pool.unmapped:
            pool.unmapped.append(Block(self._next_address, _SEGMENT_STRIDE // 2, pool, mapped=False))
            self._next_address -= _SEGMENT_STRIDE
        for hole in pool.unmapped:
            before = hole.prev
            candidate = before if before is not None and not before.allocated else hole
            room = 0
            part: Block | None = candidate
            while part is not None and not part.allocated and room < size:
                room, part = room + part.size, part.next
            if room >= size:
                break
        else:
            raise AssertionError("the address space of a segment is larger than any device")
        if not candidate.mapped:
            mapped = self._map(candidate, min(candidate.size, size))
            if mapped is None:
                return None
            candidate = mapped
        while candidate.size < size:
            after = candidate.next
            assert after is not None and not after.mapped
            mapped = self._map(after, min(size - candidate.size, after.size))
            if mapped is None:
                return None
            candidate = mapped
        pool.remove(candidate)
        return candidate

    def _map(self, hole: Block, size: int) -> Block | None:
        """Maps memory to the first `size` bytes of an unmapped block, rounded up to pages; None if the device is full."""
        pool = hole.pool
        size = min(-(-size // pool.page) * pool.page, hole.size)
        if not self._grow(size):
            return None
        pool.unmapped.remove(hole)
        hole.mapped = True
        if size < hole.size:
            rest = Block(hole.address + size, hole.size - size, pool, mapped=False, prev=hole, next=hole.next)
            if hole.next is not None:
                hole.next.prev = rest
            hole.next, hole.size = rest, size
            self._insert_unmapped(rest)
        self._merge(hole, hole.prev)
        self._merge(hole, hole.next)
        pool.add(hole)
        return hole

    def _unmap(self, block: Block) -> None:
        """Gives back the pages that lie completely inside a free block; the rest of the block stays cached."""
        pool, page = block.pool, block.pool.page
        begin = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.address:
            head = Block(block.address, begin - block.address, pool, prev=block.prev, next=block)
            if block.prev is not None:
                block.prev.next = head
            block.prev = head
            pool.add(head)
        tail_size = block.address + block.size - end
        if tail_size:
            tail = Block(end, tail_size, pool, prev=block, next=block.next)
            if block.next is not None:
                block.next.prev = tail
            block.next = tail
            pool.add(tail)
        block.address, block.size, block.mapped = begin, end - begin, False
        self.reserved -= block.size
        self._merge(block, block.prev)
        self._merge(block, block.next)
        self._insert_unmapped(block)

    @staticmethod
    def _insert_unmapped(block: Block) -> None:
        insort(block.pool.unmapped, block, key=lambda b: b.address)

    @staticmethod
    def _merge(block: Block, neighbour: Block | None) -> None:
        """Merges a neighbour into `block` if it is free and also mapped, or also unmapped; it leaves its pool."""
        if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
            return
        if neighbour.mapped:
            block.pool.remove(neighbour)
        else:
            block.pool.unmapped.remove(neighbour)
        if neighbour is block.prev:
            block.address, block.prev = neighbour.address, neighbour.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.prev = block
        block.size += neighbour.size


class AllocatorMeter(Allocator):
    """The allocator as a sink of a trace (`recording.Meter`): a storage's birth is a malloc, its death a free."""

    sees_all = True

    def born(self, block: trace.Allocation) -> None:
        block.handle = self.malloc(block.nbytes)

    def died(self, block: trace.Allocation) -> None:
        self.free(block.handle)
        block.handle = None

    def entered(self, phase: str, step: int) -> None:
        pass

    def take_peak(self) -> int:
        """The largest `allocated` since the last call, in bytes; the peak restarts at the current value."""
        peak, self.peak_allocated = self.peak_allocated, self.allocated
        return peak
