"""Which records share a row: a plan of a whole epoch, made before any record is read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data import fitting
from alignvlm_jax.data.fitting import Rows, Sizes


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
    different, counts = np.unique(keys, return_counts=True)
    sizes = Sizes(*(array.tolist() for array in (*np.divmod(different, row_tiles + 1), counts)))
    shuffled = rng.permutation(len(keys)).astype(np.int32)
    by_size = shuffled[np.argsort(keys[shuffled], kind="stable")]
    ordered = _fill(fitting.fit(sizes, row_length, row_tiles), by_size, np.cumsum(counts) - counts)
    return _shuffle_rows(ordered, rng)


def one_a_row(count: int, seed: Sequence[int], epoch: int) -> Plan:
    """Returns the plan of rows that hold one of `count` records each, shuffled."""
    rng = np.random.default_rng([*seed, epoch])
    return Plan(np.arange(count + 1), rng.permutation(count).astype(np.int32))


def _fill(groups: list[Rows], by_size: np.ndarray, starts: np.ndarray) -> Plan:
    """Gives each place in the rows a record of its size, out of those of one size in their shuffled order."""
    nexts = starts.tolist()
    records = np.empty(len(by_size), np.int32)
    row_sizes = [np.zeros(0, np.int64)]
    end = 0
    for rows, contents in groups:
        parts = []
        for size, each in contents.items():
            start, nexts[size] = nexts[size], nexts[size] + rows * each
            parts.append(by_size[start : nexts[size]].reshape(rows, each))
        block = np.concatenate(parts, axis=1)
        records[end : end + block.size] = block.ravel()
        end += block.size
        row_sizes.append(np.full(rows, block.shape[1]))
    return Plan(np.concatenate([[0], np.cumsum(np.concatenate(row_sizes))]), records)


def _shuffle_rows(ordered: Plan, rng: np.random.Generator) -> Plan:
    sizes = np.diff(ordered.offsets)
    order = rng.permutation(len(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes[order])])
    moved = np.repeat(ordered.offsets[order] - offsets[:-1], sizes[order])
    return Plan(offsets, ordered.records[moved + np.arange(len(moved))])
