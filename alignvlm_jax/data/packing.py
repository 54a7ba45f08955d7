"""Offline packing: which records share a row, planned for a whole epoch before any record is
read."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 19
"""Records that are looked at together."""


class Sizes(NamedTuple):
    """Different sizes of records."""

    lengths: list[int]  # tokens, above 0
    tiles: list[int]
    counts: list[int]


class Bins(NamedTuple):
    """Rows that hold the same: so many records of each size, by its index."""

    count: int
    contents: dict[int, int]


def fit(sizes: Sizes, seq_len: int, max_tiles: int) -> list[Bins]:
    """Returns rows that hold all records; each size must fit a row."""
    candidates = best_fit(sizes, seq_len, max_tiles), even_fit(sizes, seq_len, max_tiles)
    return min(candidates, key=lambda rows: sum(row.count for row in rows))


def best_fit(sizes: Sizes, seq_len: int, max_tiles: int) -> list[Bins]:
    """Puts each record, the largest first, into the row with the least room for it."""
    # groups[t][n]: rows that have t tiles and n tokens left; bit n of rooms[t] says whether there
    # are any.
    groups: list[dict[int, list[Bins]]] = [{} for _ in range(max_tiles + 1)]
    # Ints as sets of numbers: the least room that fits is found by a shift and a lowest bit,
    # however many rows there are.
    rooms = [0] * (max_tiles + 1)

    def leave(tiles_left: int, room: int, rows: Bins) -> None:
        groups[tiles_left].setdefault(room, []).append(rows)
        rooms[tiles_left] |= 1 << room

    def take(tiles_left: int, room: int) -> Bins:
        rows = groups[tiles_left][room].pop()
        if not groups[tiles_left][room]:
            # The bit is set, so that XOR clears it.
            rooms[tiles_left] ^= 1 << room
        return rows

    for size in _largest_first(sizes, seq_len, max_tiles):
        length = sizes.lengths[size]
        num_tiles = sizes.tiles[size]
        left = sizes.counts[size]
        while left:
            room, tiles_left = _least_room(rooms, length, num_tiles)
            if room:
                rows = take(tiles_left, room)
            else:
                room = seq_len
                tiles_left = max_tiles
                rows = Bins(left, {})
            # The row that took one has the least room for the next of its size too.
            each = min(room // length, tiles_left // num_tiles if num_tiles else left, left)
            # Rows that hold the same are counted and not listed: `used` of them get `each` records
            # more, the others stay as they are. Of rows just opened, none are left over.
            used = min(rows.count, left // each)
            if rows.contents and used < rows.count:
                leave(tiles_left, room, Bins(rows.count - used, rows.contents))
            leave(
                tiles_left - each * num_tiles,
                room - each * length,
                Bins(used, rows.contents | {size: each}),
            )
            left -= used * each
    return [rows for by_room in groups for found in by_room.values() for rows in found]


def _least_room(rooms: list[int], length: int, num_tiles: int) -> tuple[int, int]:
    """The fewest tokens left in a row that a record fits, and the tiles left there; 0 tokens where
    there is none."""
    best = 0, 0
    for tiles_left in range(num_tiles, len(rooms)):
        fitting = rooms[tiles_left] >> length
        if fitting:
            # x & -x keeps the lowest bit: of 0b0110 that is 0b0010. Bit n stands for length + n
            # tokens left.
            room = length + (fitting & -fitting).bit_length() - 1
            if not best[0] or room < best[0]:
                best = room, tiles_left
    return best


def even_fit(sizes: Sizes, seq_len: int, max_tiles: int) -> list[Bins]:
    """Fills row after row: to the largest record left come as many as bring their average closest
    to that of all records left, each of them as close to it as there is one, and the last as long
    as fits."""
    supply = _Supply(sizes, max_tiles)
    shortest = min(sizes.lengths, default=0)
    found = []
    for size in _largest_first(sizes, seq_len, max_tiles):
        while supply.counts[size]:
            average = supply.num_tokens / supply.num_records
            supply.take(size, 1)
            contents = {size: 1}
            room = seq_len - sizes.lengths[size]
            tiles_left = max_tiles - sizes.tiles[size]
            while room >= shortest:
                # By how many records the room would be filled if all were of one length, that
                # closest to average.
                number = max(1, int(room / average))
                number += abs(room / (number + 1) - average) < abs(room / number - average)
                other = supply.nearest(room // number, room, tiles_left)
                if other is None:
                    break
                supply.take(other, 1)
                contents[other] = contents.get(other, 0) + 1
                room = room - sizes.lengths[other]
                tiles_left = tiles_left - sizes.tiles[other]
            # As many more rows of the kind as there are records for: every kind uses up a size.
            more = min(supply.counts[other] // each for other, each in contents.items())
            for other, each in contents.items():
                supply.take(other, more * each)
            found.append(Bins(1 + more, contents))
    return found


class _Supply:
    """The records that are left, by size."""

    def __init__(self, sizes: Sizes, max_tiles: int):
        self._sizes = sizes
        self._size_of = {
            key: size for size, key in enumerate(zip(sizes.tiles, sizes.lengths, strict=True))
        }
        # Bit n of lengths[t] says whether a record of n tokens and t tiles is left.
        self._lengths = [0] * (max_tiles + 1)
        for num_tiles, length in self._size_of:
            self._lengths[num_tiles] |= 1 << length
        self.counts = list(sizes.counts)
        self.num_records = sum(sizes.counts)
        self.num_tokens = sum(
            length * count for length, count in zip(sizes.lengths, sizes.counts, strict=True)
        )

    def take(self, size: int, count: int) -> None:
        self.counts[size] -= count
        self.num_records -= count
        self.num_tokens -= count * self._sizes.lengths[size]
        if count and not self.counts[size]:
            self._lengths[self._sizes.tiles[size]] ^= 1 << self._sizes.lengths[size]

    def nearest(self, length: int, longest: int, tiles_left: int) -> int | None:
        """The size closest to a length, of those of at most `longest` tokens and `tiles_left`
        tiles."""
        best = None
        distance = longest + 1
        # Bits 0 to `length`, of which the highest that is set is the longest record not above it.
        up_to_length = (2 << length) - 1
        for num_tiles, lengths in enumerate(self._lengths[: tiles_left + 1]):
            below = (lengths & up_to_length).bit_length() - 1
            if below > 0 and length - below < distance:
                best = (num_tiles, below)
                distance = length - below
            above = lengths >> (length + 1)
            if above:
                # Bit 0 of `above` stands for length + 1, so that the lowest bit's place, from 1, is
                # the step.
                steps = (above & -above).bit_length()
                if length + steps <= longest and steps < distance:
                    best = (num_tiles, length + steps)
                    distance = steps
        return None if best is None else self._size_of[best]


def _largest_first(sizes: Sizes, seq_len: int, max_tiles: int) -> list[int]:
    """Returns the sizes by the fraction of a row that a record needs, of tokens or of tiles."""
    lengths = np.array(sizes.lengths)
    tiles = np.array(sizes.tiles)
    need = np.maximum(lengths / seq_len, tiles / max_tiles)
    # The last key of lexsort counts first: the need, and among equals the length.
    return np.lexsort((-lengths, -need)).tolist()


class Packing(NamedTuple):
    """Row r holds the records `records[offsets[r]:offsets[r + 1]]`, by their index in what was
    planned."""

    offsets: np.ndarray  # int64 [rows + 1]
    records: np.ndarray  # int32 [records], each of them once


def plan(
    lengths: np.ndarray,
    tiles: np.ndarray,
    seq_len: int,
    max_tiles: int,
    seed: Sequence[int],
    epoch: int,
) -> Packing:
    """Returns the packed sequences of an epoch, a pure function of the arguments.

    Args:
      lengths: int [N], tokens of each record with its image tokens, above 0. One that is longer
        than a sequence gets one of its own.
      tiles: int [N], tiles of each, at most `max_tiles`.
      seq_len: tokens of a sequence.
      max_tiles: tiles of a sequence.
      seed: of the shuffle: which of the records of one size go where, and the sequences' order.
      epoch: as well.
    """
    rng = np.random.default_rng([*seed, epoch])
    keys = _keys(lengths, tiles, seq_len, max_tiles)
    counts = _count(keys)
    different = np.flatnonzero(counts)
    numbers = counts[different]
    sizes = Sizes(*(array.tolist() for array in (*np.divmod(different, max_tiles + 1), numbers)))
    by_size = _by_size(keys, counts, shuffled(len(keys), rng))
    del keys, counts  # 4 bytes a record each, of which there may be fifty million
    ordered = _place(fit(sizes, seq_len, max_tiles), by_size, np.cumsum(numbers) - numbers)
    del by_size
    return _shuffle(ordered, rng)


def shuffled(count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the numbers below `count` in the order of `rng.permutation`, int32 [count]."""
    numbers = np.arange(count, dtype=np.int32)
    # Half the memory of `permutation`, and the same draws.
    rng.shuffle(numbers)
    return numbers


def blocks(count: int) -> Iterator[slice]:
    """Yields slices that cover `count` places, of which each fits a processor's cache: what is
    computed on the way takes no memory to speak of."""
    for begin in range(0, count, BLOCK):
        yield slice(begin, min(begin + BLOCK, count))


def _keys(lengths: np.ndarray, tiles: np.ndarray, seq_len: int, max_tiles: int) -> np.ndarray:
    """Returns one int for both sizes of a record, which divmod takes apart again, int [N]."""
    is_small = (seq_len + 1) * (max_tiles + 1) < 2**31
    keys = np.empty(len(lengths), np.int32 if is_small else np.int64)
    for block in blocks(len(keys)):
        # In place: as one expression it would be made in 8 bytes a record first.
        keys[block] = np.minimum(lengths[block], seq_len)
        keys[block] *= max_tiles + 1
        keys[block] += tiles[block]
    return keys


def _count(keys: np.ndarray) -> np.ndarray:
    """Returns how often each key comes, int64 [largest key + 1]."""
    counts = np.zeros(int(keys.max(initial=0)) + 1, np.int64)
    for block in blocks(len(keys)):
        # Within a block a key comes once, so that += adds all of it.
        found, times = np.unique(keys[block], return_counts=True)
        counts[found] += times
    return counts


def _by_size(keys: np.ndarray, counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the records by their keys, int32 [N]; those of one key in this order, int32 [N].

    That is a stable sort by counting, which needs no array but the result.
    """
    found = np.empty(len(keys), np.int32)
    # Where the next record of each key goes.
    nexts = np.cumsum(counts) - counts
    for block in blocks(len(keys)):
        records = order[block]
        its_keys = keys[records]
        by_key = np.argsort(its_keys, kind="stable")
        its_keys = its_keys[by_key]
        # Of each key in the block the first place, and how many follow.
        firsts = np.flatnonzero(np.append(True, its_keys[1:] != its_keys[:-1]))
        times = np.diff(np.append(firsts, len(its_keys)))
        starts = nexts[its_keys[firsts]]
        found[np.repeat(starts - firsts, times) + np.arange(len(its_keys))] = records[by_key]
        nexts[its_keys[firsts]] += times
    return found


def unpacked(count: int, seed: Sequence[int], epoch: int) -> Packing:
    """Returns packed sequences that hold one of `count` records each, shuffled."""
    rng = np.random.default_rng([*seed, epoch])
    return Packing(np.arange(count + 1), shuffled(count, rng))


def _place(groups: list[Bins], by_size: np.ndarray, starts: np.ndarray) -> Packing:
    """Gives each place in the rows a record of its size, out of those of one size in their shuffled
    order."""
    nexts = starts.tolist()
    records = np.empty(len(by_size), np.int32)
    row_sizes = [np.zeros(0, np.int32)]
    end = 0
    for rows, contents in groups:
        parts = []
        for size, each in contents.items():
            start = nexts[size]
            nexts[size] = nexts[size] + rows * each
            # [rows, each]; side by side, such columns are the records of each row.
            parts.append(by_size[start : nexts[size]].reshape(rows, each))
        block = np.concatenate(parts, axis=1)
        records[end : end + block.size] = block.ravel()
        end += block.size
        row_sizes.append(np.full(rows, block.shape[1], np.int32))
    return Packing(_offsets(np.concatenate(row_sizes)), records)


def _offsets(sizes: np.ndarray) -> np.ndarray:
    """Returns where each of some rows begins, and where the last ends, int64 [rows + 1]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _shuffle(ordered: Packing, rng: np.random.Generator) -> Packing:
    """Returns the rows in another order."""
    sizes = np.diff(ordered.offsets).astype(np.int32)
    order = shuffled(len(sizes), rng)
    offsets = _offsets(sizes[order])
    records = np.empty_like(ordered.records)
    for rows in blocks(len(sizes)):
        begin = int(offsets[rows.start])
        end = int(offsets[rows.stop])
        # For each place of the new order, how much further on the old one has its record.
        further = ordered.offsets[order[rows]] - offsets[rows]
        moved = np.repeat(further, sizes[order[rows]])
        records[begin:end] = ordered.records[moved + np.arange(begin, end)]
    return Packing(offsets, records)
