import numpy as np
import pytest
from array_record.python import array_record_module

from alignvlm_jax.data import filesystem, shard_ends
from alignvlm_jax.errors import UserError

BORDER = shard_ends.BLOCK - shard_ends.BLOCK_HEADER


def write(path, records, options="group_size:1") -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def read_all(path) -> list[bytes]:
    ends = shard_ends.read_ends(path, path.stat().st_size)
    borders = ends.begins.tolist()
    return [
        shard_ends.decode(ends, i, filesystem.read_range(path, borders[i], borders[i + 1]))
        for i in range(len(borders) - 1)
    ]


def records_of(kind: str) -> list[bytes]:
    rng = np.random.default_rng(0)
    sizes = {
        "small": rng.integers(0, 200, 1500),
        # the next chunk begins around a block's header
        "borders": BORDER - rng.integers(0, 120, 300),
        "several blocks": rng.integers(0, 5 * shard_ends.BLOCK, 200),
        "exactly full": np.arange(BORDER - 150, BORDER + 30),
    }[kind]
    return [rng.bytes(size) for size in sizes.tolist()]


@pytest.mark.parametrize("kind", ["small", "borders", "several blocks", "exactly full"])
@pytest.mark.parametrize("codec", ["", ",brotli", ",zstd", ",uncompressed"])
def test_records_are_those_of_the_library(tmp_path, kind, codec):
    records = records_of(kind) + [b"text " * 5000, b""]
    write(tmp_path / "a", records, f"group_size:1{codec}")
    assert (
        read_all(tmp_path / "a")
        == array_record_module.ArrayRecordReader(str(tmp_path / "a")).read_all()
        == records
    )


@pytest.mark.parametrize("count", [0, 1, 40_000])
def test_footers_of_any_number(tmp_path, count):
    """Of 40,000 they are longer than what is read with the postscript."""
    rng = np.random.default_rng(0)
    records = [rng.bytes(size) for size in rng.integers(0, 1000, count).tolist()]
    write(tmp_path / "a", records)
    ends = shard_ends.read_ends(tmp_path / "a", (tmp_path / "a").stat().st_size)
    assert len(ends.begins) == count + 1 and (
        count < 10_000 or len(ends.footers) > shard_ends.FOOTER_BYTES
    )
    for i in {0, count // 2, count - 1} & set(range(count)):
        content = filesystem.read_range(tmp_path / "a", *ends.begins[i : i + 2].tolist())
        assert shard_ends.decode(ends, i, content) == records[i]


def test_any_flipped_bit_of_a_record_is_told(tmp_path):
    rng = np.random.default_rng(0)
    records = [rng.bytes(size) for size in (0, 5, 300, 70_000, 140_000)]
    write(tmp_path / "a", records)
    ends = shard_ends.read_ends(tmp_path / "a", (tmp_path / "a").stat().st_size)
    for _ in range(300):
        index = int(rng.integers(len(records)))
        content = bytearray(
            filesystem.read_range(tmp_path / "a", *ends.begins[index : index + 2].tolist())
        )
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        with pytest.raises(RuntimeError, match="Riegeli"):
            shard_ends.decode(ends, index, bytes(content))
    # the library has its own offsets
    shifted = ends._replace(begins=np.append(ends.begins[1:], ends.begins[-1]))
    with pytest.raises(RuntimeError):
        shard_ends.decode(
            shifted, 3, filesystem.read_range(tmp_path / "a", *shifted.begins[3:5].tolist())
        )


def test_damaged_ends_are_a_user_error(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "a", [rng.bytes(100) for _ in range(2000)])
    whole = (tmp_path / "a").read_bytes()
    ends = shard_ends.read_ends(tmp_path / "a", len(whole))
    record = filesystem.read_range(tmp_path / "a", *ends.begins[7:9].tolist())
    told = {"at once": 0, "with a record": 0, "harmless": 0}
    footers = int(ends.begins[-1])
    postscript = len(whole) - shard_ends.BLOCK
    for at in [
        *rng.integers(footers, footers + len(ends.footers), 200),
        *range(postscript, postscript + 110),
    ]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "a").write_bytes(damaged)
        try:
            found = shard_ends.read_ends(tmp_path / "a", len(whole))
            # The library compares checksums of the ends with every record.
            assert shard_ends.decode(found, 7, record) == shard_ends.decode(ends, 7, record)
            told["harmless"] += 1
        except UserError as err:
            assert "cannot read" in str(err) and "\n" not in str(err)
            told["at once"] += 1
        except RuntimeError:
            told["with a record"] += 1
    assert (
        min(told["at once"], told["with a record"]) > 20
        and told["harmless"] <= shard_ends.BLOCK_HEADER
    )
    for size in (0, 10, shard_ends.BLOCK, len(whole) // 2):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot read"):
            shard_ends.read_ends(tmp_path / "a", size)


def test_several_records_a_chunk_are_refused(tmp_path):
    write(tmp_path / "a", [b"1", b"2", b"3"], "group_size:2")
    with pytest.raises(UserError, match=r"chunks of 2 records; write one each"):
        shard_ends.read_ends(tmp_path / "a", (tmp_path / "a").stat().st_size)


def test_a_table_gives_the_ends_of_each_shard(tmp_path):
    ends = []
    for name, count in (("a", 3), ("b", 0), ("c", 5)):
        write(tmp_path / name, [bytes([i]) * 50 for i in range(count)])
        ends.append(shard_ends.read_ends(tmp_path / name, (tmp_path / name).stat().st_size))
    table = shard_ends.table(ends)
    assert table.counts.tolist() == [3, 0, 5]
    for number, end in enumerate(ends):
        found = table.ends(number)
        assert np.array_equal(found.begins, end.begins)
        assert (found.size, found.footers, found.postscript) == (
            end.size,
            end.footers,
            end.postscript,
        )
