"""Which records share a row: a plan of a whole epoch, made before any record is read.

Best fit, the largest records first. Records of one size are interchangeable, so what is fitted are sizes with their
counts: the time goes with the number of different sizes, not of records, and a plan of millions takes seconds.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Contents = tuple["Contents | None", int, int]
"""What rows hold: what they held before, and then so many records of a size (its index, how many)."""


class Plan(NamedTuple):
    """Row r holds the records `records[offsets[r]:offsets[r + 1]]`, by their index in what was planned."""

    offsets: np.ndarray  # int64 [rows + 1]
    records: np.ndarray  # int32 [records], each of them once


def plan(
    lengths: np.ndarray, tiles: np.ndarray, row_length: int, row_tiles: int, seed: Sequence[int], epoch: int
) -> Plan:
    """Plans the rows of an epoch, a pure function of the arguments.

    Args:
      lengths: int [N], tokens of each record with its image slots, above 0. One that is longer than a row gets a row.
      tiles: int [N], tiles of each, at most `row_tiles`.
      row_length: tokens of a row.
      row_tiles: tiles of a row.
      seed: of the shuffle: which of the records of one size go where, and the order of the rows.
      epoch: as well.
    """
    rng = np.random.default_rng([*seed, epoch])
    keys = np.minimum(lengths, row_length).astype(np.int64) * (row_tiles + 1) + tiles
    sizes, counts = np.unique(keys, return_counts=True)
    groups = list(_best_fit(*np.divmod(sizes, row_tiles + 1), counts, row_length, row_tiles))
    shuffled = rng.permutation(len(keys)).astype(np.int32)
    by_size = shuffled[np.argsort(keys[shuffled], kind="stable")]
    return _shuffle_rows(_fill(groups, by_size, np.cumsum(counts) - counts), rng)


def one_a_row(count: int, seed: Sequence[int], epoch: int) -> Plan:
    """Returns the plan of rows that hold one of `count` records each, shuffled."""
    rng = np.random.default_rng([*seed, epoch])
    return Plan(np.arange(count + 1), rng.permutation(count).astype(np.int32))


def _best_fit(
    lengths: np.ndarray, tiles: np.ndarray, counts: np.ndarray, row_length: int, row_tiles: int
) -> Iterator[tuple[int, Contents]]:
    """Yields (number of rows, what each of them holds)."""
    # groups[t][n]: rows that have t tiles and n tokens left; bit n of rooms[t] says whether there are any.
    groups: list[dict[int, list[tuple[int, Contents]]]] = [{} for _ in range(row_tiles + 1)]
    rooms = [0] * (row_tiles + 1)

    def leave(tiles_left: int, room: int, rows: int, contents: Contents) -> None:
        groups[tiles_left].setdefault(room, []).append((rows, contents))
        rooms[tiles_left] |= 1 << room

    def take(tiles_left: int, room: int) -> tuple[int, Contents]:
        found = groups[tiles_left][room]
        group = found.pop()
        if not found:
            rooms[tiles_left] ^= 1 << room
        return group

    need = np.maximum(lengths / row_length, tiles / row_tiles)
    for size in np.lexsort((-lengths, -need)).tolist():
        length, num_tiles, left = int(lengths[size]), int(tiles[size]), int(counts[size])
        while left:
            room, tiles_left = _least_room(rooms, length, num_tiles)
            rows, before = take(tiles_left, room) if room else (left, None)
            room, tiles_left = (room, tiles_left) if room else (row_length, row_tiles)
            # The rows that a record was put into have the least room for the next one of its size too.
            each = min(room // length, tiles_left // num_tiles if num_tiles else left, left)
            used = min(rows, left // each)
            if before is not None and used < rows:
                leave(tiles_left, room, rows - used, before)
            left -= used * each
            leave(tiles_left - each * num_tiles, room - each * length, used, (before, size, each))
    for by_room in groups:
        for found in by_room.values():
            yield from found


def _least_room(rooms: list[int], length: int, num_tiles: int) -> tuple[int, int]:
    """The fewest tokens left in a row that a record fits, and the tiles left there; 0 tokens where there is none."""
    best = 0, 0
    for tiles_left in range(num_tiles, len(rooms)):
        fitting = rooms[tiles_left] >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            if not best[0] or room < best[0]:
                best = room, tiles_left
    return best


def _fill(groups: list[tuple[int, Contents]], by_size: np.ndarray, starts: np.ndarray) -> Plan:
    """Gives each place in the rows a record of its size, out of those of one size in their shuffled order."""
    nexts = starts.tolist()
    records = np.empty(len(by_size), np.int32)
    row_sizes: list[np.ndarray] = []
    end = 0
    for rows, contents in groups:
        parts = []
        link: Contents | None = contents
        while link is not None:
            link, size, each = link
            parts.append(by_size[nexts[size] : nexts[size] + rows * each].reshape(rows, each))
            nexts[size] += rows * each
        block = np.concatenate(parts[::-1], axis=1)
        records[end : end + block.size] = block.ravel()
        end += block.size
        row_sizes.append(np.full(rows, block.shape[1]))
    sizes = np.concatenate(row_sizes) if row_sizes else np.zeros(0, np.int64)
    return Plan(np.concatenate([[0], np.cumsum(sizes)]), records)


def _shuffle_rows(ordered: Plan, rng: np.random.Generator) -> Plan:
    sizes = np.diff(ordered.offsets)
    order = rng.permutation(len(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes[order])])
    moved = np.repeat(ordered.offsets[order] - offsets[:-1], sizes[order])
    return Plan(offsets, ordered.records[moved + np.arange(len(moved))])
