"""The places of records in ArrayRecord shards, so that reading a record is a single ranged read.

A shard is a Riegeli file: a chunk for each record (`group_size:1`), a chunk of footers with their
offsets, and a last block of 64 KiB, the postscript, which says where the footers are. The library
reads local files only. So the chunk of a record is written at its place into an empty file in
memory, together with the ends of the shard, and the library reads that: it decodes the record and
compares checksums as usual.
"""

import os
import struct
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from array_record.python import array_record_module

from alignvlm_jax.data import filesystem
from alignvlm_jax.errors import UserError

BLOCK = 1 << 16
BLOCK_HEADER = 24
# Header hash, data size, data hash, chunk type (8 bits) and number of records, decoded size.
CHUNK_HEADER = struct.Struct("<QQQQQ")
CODECS = {0: "", ord("b"): "brotli", ord("z"): "zstd"}
FOOTER_BYTES = 2 * BLOCK
"""Bytes that are read with the postscript, which have the footers of some 20,000 records."""
MAX_FOOTER_BYTES = 1 << 30
FIELDS = (8, 16, 24)
"""The protobuf tags of a footer's offset, decoded size and number of records."""
SIGNATURE = bytes.fromhex(
    "83af70d10d884a3f0000000000000000400000000000000091bac23c9287e1a9"
    "0000000000000000e19f13c0e9b1c37273000000000000000000000000000000"
)
"""The first bytes of every Riegeli file."""
# The file in memory has only the record that is asked for: nothing may be read ahead.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"


class Ends(NamedTuple):
    """The part of a shard behind its R records, without the zeros that fill it up."""

    size: int  # of the whole shard, in bytes
    # int64 [R + 1]: record r is in bytes begins[r] to begins[r + 1]; begins[R] is the footers'.
    begins: np.ndarray
    footers: bytes
    postscript: bytes


class Table(NamedTuple):
    """The ends of S shards with R records, one shard after another, as arrays for an .npz file."""

    sizes: np.ndarray  # int64 [S]
    counts: np.ndarray  # int64 [S], records
    begins: np.ndarray  # int64 [R + S], `Ends.begins`
    footers: np.ndarray  # uint8, all of them
    footer_starts: np.ndarray  # int64 [S + 1]
    postscripts: np.ndarray  # uint8
    postscript_starts: np.ndarray  # int64 [S + 1]

    def ends(self, shard: int) -> Ends:
        """Returns the ends of one shard."""
        # Each shard before has an entry more in `begins` than it has records.
        start = int(self.counts[:shard].sum()) + shard
        return Ends(
            int(self.sizes[shard]),
            self.begins[start : start + int(self.counts[shard]) + 1],
            self.footers[self.footer_starts[shard] : self.footer_starts[shard + 1]].tobytes(),
            self.postscripts[
                self.postscript_starts[shard] : self.postscript_starts[shard + 1]
            ].tobytes(),
        )


def table(ends: Sequence[Ends]) -> Table:
    """Returns the table of the shards with these ends, in their order."""
    footers = [end.footers for end in ends]
    postscripts = [end.postscript for end in ends]
    return Table(
        np.array([end.size for end in ends], np.int64),
        np.array([len(end.begins) - 1 for end in ends], np.int64),
        np.concatenate([np.zeros(0, np.int64), *(end.begins for end in ends)]),
        np.frombuffer(b"".join(footers), np.uint8),
        np.cumsum([0, *map(len, footers)], dtype=np.int64),
        np.frombuffer(b"".join(postscripts), np.uint8),
        np.cumsum([0, *map(len, postscripts)], dtype=np.int64),
    )


def read_ends(path: str | os.PathLike, size: int) -> Ends:
    """Returns the ends of a shard of `size` bytes, by one request (two if it has many records).

    Raises:
      UserError: they are damaged, or a chunk holds several records.
      OSError: they cannot be read.
    """
    begin = max(0, size - BLOCK - FOOTER_BYTES)
    tail = filesystem.read_range(path, begin, size)
    # The postscript is a chunk with one record, whose first field is the offset of the footers.
    postscript = tail[-BLOCK:]
    try:
        values = _varints(_decode(postscript, size - BLOCK)[1])
        footer = int(values[1])
        if values[0] != FIELDS[0] or not 0 < footer < size - BLOCK:
            raise ValueError(f"no footers at byte {footer}")
        # The footers of many records begin before what was read: only the missing bytes are.
        if footer < begin:
            tail = filesystem.read_range(path, footer, begin) + tail
            begin = footer
        footers = tail[footer - begin : -BLOCK]
        begins = np.append(_offsets(footers, footer), footer)
        # Ascending, and behind the file's signature: else a damaged offset would read wrong bytes.
        if (np.diff(begins) <= 0).any() or (len(begins) > 1 and begins[0] < len(SIGNATURE)):
            raise ValueError("records overlap")
    except (ValueError, IndexError, KeyError, struct.error, pa.ArrowException) as err:
        raise UserError(f"cannot read {path} ({' '.join(str(err).split())})") from err
    return Ends(size, begins, footers.rstrip(b"\0"), postscript.rstrip(b"\0"))


def decode(ends: Ends, index: int, content: bytes) -> bytes:
    """Returns record `index` of a shard.

    Args:
      ends: the ends of the shard.
      index: number of the record in the shard.
      content: the bytes of the shard from `ends.begins[index]` to `ends.begins[index + 1]`.

    Raises:
      RuntimeError: the bytes are damaged.
    """
    file = _memory_file()
    try:
        # As long as the shard but sparse: it takes memory only where something is written.
        os.ftruncate(file, ends.size)
        parts = {
            0: SIGNATURE,
            int(ends.begins[index]): content,
            int(ends.begins[-1]): ends.footers,
            ends.size - BLOCK: ends.postscript,
        }
        for at, part in parts.items():
            os.pwrite(file, part, at)
        reader = array_record_module.ArrayRecordReader(f"/dev/fd/{file}", READER_OPTIONS)
        try:
            return reader.read([index])[0]
        finally:
            reader.close()
    finally:
        os.close(file)


def _memory_file() -> int:
    """Returns the descriptor of an empty file in memory (on other systems than Linux, on disk)."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("record")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _offsets(footers: bytes, at: int) -> np.ndarray:
    """Returns the offsets of all chunks, int64 [R], that a chunk of footers holds.

    Raises:
      ValueError: the footers are of another kind, or a chunk holds several records.
    """
    sizes, values = _decode(footers, at)
    # The first record describes the kind of footers. Each other one is a message of three integers,
    # so that all are alternately tags and values: [R, 6].
    fields = _varints(values[int(sizes[0]) :]).reshape(-1, 2 * len(FIELDS))
    if len(fields) != len(sizes) - 1 or (fields[:, ::2] != FIELDS).any():
        raise ValueError("footers of another kind")
    if (fields[:, 5] != 1).any():
        raise ValueError(f"chunks of {fields[:, 5].max()} records; write one each (group_size:1)")
    return fields[:, 1]


def _decode(content: bytes, at: int) -> tuple[np.ndarray, bytes]:
    """Returns the sizes of the records of a simple chunk, int64 [n], and the records joined.

    Args:
      content: bytes of the file from the chunk's begin to its end or beyond.
      at: the byte of the file where the chunk begins.

    Raises:
      ValueError: the chunk is damaged or of another type.
    """
    chunk = _without_block_headers(content, at)
    _, num_bytes, _, kind, decoded = CHUNK_HEADER.unpack_from(chunk)
    data = chunk[CHUNK_HEADER.size : CHUNK_HEADER.size + num_bytes]
    if kind & 0xFF != ord("r") or len(data) != num_bytes:
        raise ValueError(f"no chunk of records at byte {at}")
    codec = CODECS[data[0]]
    num_sizes, start = _varint(data, 1)
    sizes = _varints(_decompress(codec, data[start : start + num_sizes]))
    values = _decompress(codec, data[start + num_sizes :])
    if len(sizes) != kind >> 8 or len(values) != decoded or sizes.sum() != decoded:
        raise ValueError(f"a damaged chunk at byte {at}")
    return sizes, values


def _without_block_headers(content: bytes, at: int) -> bytes:
    """Returns bytes of a file, from byte `at` on, without the headers of blocks.

    Riegeli writes a header of 24 bytes at every multiple of 64 KiB, also in the midst of a chunk.
    """
    # Distance to the next multiple of BLOCK, 0 at one.
    first = -at % BLOCK
    blocks = range(first, len(content), BLOCK)
    return b"".join(
        [content[:first], *(content[block + BLOCK_HEADER : block + BLOCK] for block in blocks)]
    )


def _decompress(codec: str, content: bytes) -> bytes:
    """Returns decompressed bytes, whose size comes first as a varint (but not without a codec)."""
    if not codec:
        return content
    size, start = _varint(content, 0)
    if size > MAX_FOOTER_BYTES:
        raise ValueError(f"footers of {size} bytes")
    try:
        return pa.Codec(codec).decompress(content[start:], size).to_pybytes()
    except OSError as err:  # pyarrow's exception for damaged content, too
        raise ValueError(err) from err


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns the varint that begins at byte `at`, and the byte where it ends."""
    value = shift = 0
    while content[at] & 0x80:
        value |= (content[at] & 0x7F) << shift
        shift += 7
        at += 1
    return value | content[at] << shift, at + 1


def _varints(content: bytes) -> np.ndarray:
    """Returns consecutive varints, int64 [n].

    A varint has 7 bits a byte, the lowest first; the highest bit says that it continues.

    Raises:
      ValueError: the last one has no end.
    """
    # All at once, without a loop over bytes: `places` is the position of each byte in its number.
    digits = np.frombuffer(content, np.uint8).astype(np.int64)
    lasts = np.flatnonzero(digits < 0x80)
    if not len(lasts):
        return np.zeros(0, np.int64)
    if lasts[-1] != len(digits) - 1:
        raise ValueError("a number without an end")
    firsts = np.append(0, lasts[:-1] + 1)
    places = np.arange(len(digits)) - np.repeat(firsts, lasts - firsts + 1)
    return np.add.reduceat((digits & 0x7F) << (7 * places), firsts)
