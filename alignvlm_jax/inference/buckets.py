"""The shapes of batches that prompts are padded to: few, since each is compiled by itself."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import sequences
from alignvlm_jax.data.sequences import PackedSequence

TEXT_ROOM = 256
"""Tokens of text that the smaller of the two buckets of a number of tiles has room for in a server;
the larger one has all of `data.seq_len`."""
MULTIPLE = 64
SHORTEST = 16
"""Tokens of the smallest bucket, and the least by which two differ."""
FINE_UP_TO = 128
"""Tokens up to which lengths of buckets are an eighth of a power of two apart, beyond a quarter."""


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A shape of prompts.

    Attributes:
      num_tiles: of each prompt; 0: the language model alone.
      length: tokens of each prompt, image tokens included.
    """

    num_tiles: int
    length: int


def of_extent(length: int, num_tiles: int, longest: int, most_tiles: int) -> Bucket:
    """Returns the bucket of a prompt by its own size alone, whatever is answered beside it.

    Args:
      length, num_tiles: of the prompt.
      longest, most_tiles: of any prompt; no bucket is larger.
    """
    # The least power of two that is no smaller.
    top = 1 << (length - 1).bit_length()
    step = max(top // (8 if top <= FINE_UP_TO else 4), SHORTEST)
    tiles = 1 << (num_tiles - 1).bit_length() if num_tiles else 0
    return Bucket(min(tiles, most_tiles), min(-(-length // step) * step, longest))


def buckets(data: DataConfig, tokens_per_tile: int) -> tuple[Bucket, ...]:
    """Returns the shapes that any prompt of a model fits one of, the smallest first: those of a
    server, which compiles all at its start."""
    most = data.tiles_of_a_record
    longest = data.seq_len
    made = set()
    # No page, one of a single tile, or a larger one.
    # More levels would waste fewer padded tiles, and each takes a few programs to compile.
    for num_tiles in {0, 1, most}:
        length = num_tiles * tokens_per_tile + TEXT_ROOM
        length = -(-length // MULTIPLE) * MULTIPLE
        made |= {Bucket(num_tiles, min(length, longest)), Bucket(num_tiles, longest)}
    return tuple(sorted(made))


def sizes(batch_size: int, data_parallel_size: int) -> tuple[int, ...]:
    """Returns the numbers of rows of batches: one for a request alone, and one for many."""
    # Rounded up, by -(-a // b): all devices have as many.
    return tuple(
        sorted({-(-count // data_parallel_size) * data_parallel_size for count in (1, batch_size)})
    )


def bucket_of(known: Sequence[Bucket], num_tiles: int, length: int) -> Bucket:
    """Returns the smallest of the buckets that has room for a prompt."""
    # By tiles first: a tile costs the vision encoder and its image tokens, a token of text one.
    tiles = sorted({bucket.num_tiles for bucket in known})
    most = tiles[bisect.bisect_left(tiles, num_tiles)]
    return next(bucket for bucket in known if bucket.num_tiles == most and bucket.length >= length)


def fit(prompt: PackedSequence, bucket: Bucket) -> PackedSequence:
    """Returns a prompt of a bucket's shape."""
    # Numbers, as those of noise, have no length.
    numbers = {name: array for name, array in prompt.items() if not array.ndim}
    arrays = {name: array for name, array in prompt.items() if array.ndim}
    # What is cut off is padding and unused tiles: the bucket has room for all of the prompt.
    trimmed = sequences.trim(arrays, bucket.length, bucket.num_tiles)
    if not bucket.num_tiles:
        # The program without them is another: no image is encoded.
        trimmed.pop("tiles", None)
        trimmed.pop("kept_patches", None)
    return trimmed | numbers


def all_shapes(known: Sequence[Bucket], rows: Sequence[int]) -> list[tuple[int, Bucket]]:
    """Returns the numbers of rows and buckets that are compiled, the smallest first."""
    return list(itertools.product(rows, known))
