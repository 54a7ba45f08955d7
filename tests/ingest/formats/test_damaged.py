"""Files of every format with bytes cut off, flipped or overwritten: what cannot be read has a
reason, and nothing else happens."""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import REGISTRY, checks
from alignvlm_jax.ingest.formats.base import Reject, Rejection

COUNT = 12


def image() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)).save(
        file, "JPEG"
    )
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(COUNT):
            for ending, data in (("jpg", image()), ("json", b'{"caption": "A page."}')):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    columns = {
        "image": [{"bytes": image(), "path": "a"}] * COUNT,
        "query": ["q?"] * COUNT,
        "label": [["a"]] * COUNT,
    }
    pq.write_table(pa.table(columns), file, row_group_size=4)
    return file.getvalue()


def objects(of_one: dict) -> list[str]:
    return [json.dumps(of_one)] * COUNT


def chat(messages: str, role: str, content: str, evaluator: str, answerer: str) -> dict:
    return {messages: [{role: evaluator, content: "q?"}, {role: answerer, content: "a"}]}


FILES = {
    "a.tar": ("webdataset", tar),
    "a.tar.gz": ("webdataset", lambda: gzip.compress(tar(), mtime=0)),
    "a.parquet": ("parquet", parquet),
    "a.json": ("llava", lambda: f"[{','.join(objects(LLAVA))}]".encode()),
    "b.jsonl": ("llava", lambda: "\n".join(objects(LLAVA)).encode()),
    "c.jsonl": ("docdownstream", lambda: "\n".join(objects(DOCDOWNSTREAM)).encode()),
    "d.jsonl": (
        "jsonl",
        lambda: "\n".join(objects({"turns": [{"question": "q?", "answers": ["a"]}]})).encode(),
    ),
}
LLAVA = chat("conversations", "from", "value", "human", "gpt")
DOCDOWNSTREAM = chat("messages", "role", "content", "user", "assistant")


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    kind = rng.integers(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    return data[:at] + (b"\0" * 16 if kind == 2 else rng.bytes(16)) + data[at + 16 :]


def read(name: str, folder) -> tuple[int, list[str]]:
    """The records that can be used, and the reasons against others."""
    form = REGISTRY[FILES[name][0]]()
    good = 0
    reasons = []
    try:
        units = form.units(str(folder))
    except UserError as err:
        return 0, [str(err)]
    for item in (item for unit in units for item in form.raws(unit)):
        try:
            if isinstance(item, Rejection):
                raise Reject(item.reason)
            checks.check(form.record(item))
            good += 1
        except Reject as err:
            reasons.append(str(err))
    return good, reasons


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(tmp_path, name):
    whole = FILES[name][1]()
    (tmp_path / name).write_bytes(whole)
    assert read(name, tmp_path) == (COUNT, [])
    rng = np.random.default_rng(0)
    total = rejected = 0
    for _ in range(40):
        (tmp_path / name).write_bytes(damage(whole, rng))
        good, reasons = read(name, tmp_path)
        assert good <= COUNT and all(reason and "\n" not in reason for reason in reasons)
        # Of lines and of an array that is cut off between two records nobody can tell.
        assert good == COUNT or reasons or name.endswith((".json", ".jsonl"))
        total = total + good
        rejected = rejected + len(reasons)
    assert rejected and total > 40 * COUNT / 4
