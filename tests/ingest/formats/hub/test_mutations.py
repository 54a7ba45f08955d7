"""About 1,000 damaged rows of all public sets: each is read right, or rejected with a reason.

What is read is held against the row itself: all images, in their order, all of the questions, no
answer that the row does not have.
"""

import ast
import copy
import io
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import checks
from alignvlm_jax.ingest.formats.base import Format, Reject, Rejection
from alignvlm_jax.ingest.formats.hub import known_sets
from alignvlm_jax.ingest.formats.parquet import Parquet
from alignvlm_jax.ingest.formats.webdataset import WebDataset
from tests.ingest.formats.hub import public_sets
from tests.ingest.formats.hub.public_sets import DOCUMENTS, ROWS

NUM_MUTATIONS = 75
"""Of each set."""
QUESTIONS = ("question", "Question", "texts", "conversations", "choices", "options")
ANSWERS = ("answer", "answers", "Answer", "ground_truth")
PAGES = re.compile(r"(page|image)_\d+")
VALUES = (
    *(None, True, False, 0, 1, 2, -1, 7, 2**62, 0.5, 1.0, float("nan"), float("inf"), ""),
    *(" ", "A", "B", "1", "<image>", "<image> <image>", "['a', 'b']", "['a' 'b']", "{", "[]"),
    *("none.png", "../../evil.png", "data:image/png;base64,?", "https://example.com/1.png"),
    *(b"", b"no image", [], {}, [None], [[]], ["a"], [1, 2], {"a": 1}, [{"a": 1}]),
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within a row."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy of a row with one to three values replaced, dropped, doubled, cut or wrapped."""
    row = copy.deepcopy(row)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(row)) or [()])
        if not path:
            break
        parent = row
        for key in path[:-1]:
            parent = parent[key]
        value = parent[path[-1]]
        kind = rng.choice(("replace", "replace", "drop", "list", "text"))
        if kind == "drop":
            del parent[path[-1]]
        elif kind == "list" and isinstance(value, list) and value:
            parent[path[-1]] = rng.choice(
                ([*value, None], value[:-1], [*value, value[0]], value[::-1], [value, value])
            )
        elif kind == "list":
            parent[path[-1]] = [value]
        elif kind == "text" and isinstance(value, str):
            parent[path[-1]] = rng.choice(
                (f"<image>{value}", f"{value} <image>", [value], value * 2)
            )
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return row


def read(form: Format, path: Path) -> list[Record | Rejection]:
    """What a file gives, record by record; no fault of it may raise anything."""
    try:
        raws = [raw for unit in form.units(str(path)) for raw in form.raws(unit)]
    except UserError as err:
        return [Rejection("all", str(err))]
    found = []
    for raw in raws:
        try:
            found.append(raw if isinstance(raw, Rejection) else checked(form.record(raw)))
        except Reject as err:
            found.append(Rejection(raw.id, str(err)))
    for item in found:
        if isinstance(item, Rejection):
            assert item.reason and "\n" not in item.reason and len(item.reason) < 1000, item
    return found


def checked(record: Record) -> Record:
    """The record, which passes the checks of all: what they drop is counted by others."""
    checks.check(record)
    return record


def texts_of(value: Any) -> list[str]:
    """All texts and numbers within a value, as texts."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_of(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in texts_of(inner)]
    return [] if value is None or isinstance(value, bytes) else [str(value)]


def images_of(row: dict[str, Any]) -> list[Any]:
    """The image files of a row in their order; None for one that is missing."""
    if pages := [name for name in row if PAGES.fullmatch(name)]:
        found = [row[name] for name in sorted(pages, key=lambda name: int(name.rpartition("_")[2]))]
        # The last ones may be null.
        while found and empty(found[-1]):
            found.pop()
    else:
        value = row.get("image", row.get("images"))
        found = value if isinstance(value, list) else [] if empty(value) else [value]
    return [one.get("bytes") if isinstance(one, dict) else one for one in found]


def empty(value: Any) -> bool:
    return value is None or value in ({}, {"bytes": None, "path": None}, {"bytes": None})


def asked_of(row: dict[str, Any]) -> list[str]:
    """Every text that has to stand in a question."""
    found = []
    for name in set(QUESTIONS) & set(row):
        value = row[name]
        if name == "texts":
            value = [text["user"] for text in value]
        elif name == "conversations":
            asked = [one["value"] for one in value if one["from"] == "human"]
            told = [one["value"] for one in value if one["from"] == "gpt"]
            value = asked[: len(told)]
        found += texts_of(spelt(value))
    return found


def spelt(value: Any) -> Any:
    """The list that a text spells as Python or JSON does, else the value."""
    for parse in (ast.literal_eval, json.loads):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, TypeError):
            continue
        # Python joins 'a' 'b' to one text.
        if isinstance(found, list) and (parse is json.loads or repr(found) == value):
            return found
    return value


def answers_of(row: dict[str, Any]) -> set[str]:
    """Every text that may be an answer."""
    found = [text for name in ANSWERS for text in texts_of(row.get(name))]
    found += [text.get("assistant") for text in row.get("texts") or ()]
    found += [one["value"] for one in row.get("conversations") or () if one["from"] == "gpt"]
    for name in ("choices", "options", *ANSWERS):
        found += texts_of(spelt(row.get(name)))
    return {str(text).strip() for text in found} | {*"ABCDEFG"}


def shown(value: Any) -> str:
    """A row or a record without its images."""
    return re.sub(r"b(?P<mark>['\"]).*?(?<!\\)(?P=mark)", "bytes", repr(value))


def check_row(row: dict[str, Any], record: Record) -> None:
    """Fails unless a record has what the row has."""
    if "pdf" in row:
        assert len(record.images) == 2
    else:
        assert list(record.images) == images_of(row)
    questions = "\n".join(turn.question for turn in record.turns)
    assert "<image>" not in questions
    for text in asked_of(row):
        # Every part of it, where marks stood in between.
        for part in text.split("<image>"):
            assert part.strip() in questions or part.strip() == "nan", part
    marks = sum(text.count("<image>") for text in asked_of(row))
    assert marks in (0, len(record.images))
    if isinstance(row.get("answer"), int) and "hint" in row:
        assert record.turns[0].answers[0] == str(spelt(row["choices"])[row["answer"]]).strip()
    if "ground_truth" in row:
        wanted = json.loads(row["ground_truth"])["gt_parse"]
        told = record.turns[0].answers[0]
        assert (told == str(wanted)) or json.loads(told) == wanted
        assert questions == known_sets.JSON_PROMPT
        return
    may_be = answers_of(row)
    for turn in record.turns:
        assert {answer.strip() for answer in turn.answers} <= may_be
    order = [questions.find(text.strip()) for text in asked_of(row) if "<image>" not in text]
    assert "conversations" not in row or order == sorted(order)


@pytest.mark.parametrize("name", ROWS)
def test_damaged_rows_are_read_right_or_rejected(name, tmp_path):
    rng = random.Random(name)
    counts = {Record: 0, Rejection: 0}
    wanted = NUM_MUTATIONS // 2 if name == "Docmatix-pdf" else NUM_MUTATIONS
    for number in itertools.takewhile(lambda _: sum(counts.values()) < wanted, itertools.count()):
        row = mutated(rng.choice(ROWS[name]), rng)
        path = tmp_path / f"{number}.parquet"
        try:
            table = pa.Table.from_pylist([row])
            pq.write_table(table, path)
        except (pa.ArrowException, TypeError, OverflowError, ValueError):
            continue  # Parquet has no such row.
        # What was written: a value of another type may have become one of the column's.
        if not (written := table.to_pylist()):
            continue  # All its columns are gone.
        [row] = written
        found = read(Parquet(), path)
        assert len(found) == 1
        counts[type(found[0])] += 1
        if isinstance(found[0], Record):
            try:
                check_row(row, found[0])
            except Exception as err:
                raise AssertionError(f"{shown(row)}\n{shown(found[0])}") from err
    # Neither may be what becomes of all: damage is found, and does not spread.
    assert counts[Record] >= 5 and counts[Rejection] >= 10, counts


def check_page(page: dict[str, Any], record: Record) -> None:
    """Fails unless a record has the words of a page, where they stand."""
    words = [word for line in record.lines[0] for word in line]
    part = page.get("words") or {}
    part = part if part.get("text") else page["lines"]
    texts = [text for text in part["text"] if text.strip()]
    assert sorted(word.text for word in words) == sorted(texts)
    boxes = {text: box for text, box in zip(part["text"], part["bbox"], strict=True)}
    size = Image.open(io.BytesIO(record.images[0])).size
    for word in words if len(set(texts)) == len(texts) else ():
        left, top, wide, high = boxes[word.text]
        shares = (left, top, left + wide, top + high)
        assert word.box == pytest.approx([a * b for a, b in zip(shares, size * 2, strict=True)])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_damaged_documents_are_read_right_or_rejected(name, tmp_path):
    rng = random.Random(name)
    counts = {Record: 0, Rejection: 0}
    for number in range(NUM_MUTATIONS):
        content = mutated(public_sets.document(), rng)
        try:
            path = public_sets.write_document(tmp_path / f"{number}.tar", name, content)
        except TypeError:
            continue  # JSON has no bytes.
        found = read(WebDataset(), path)
        assert len(found) in (1, 2)
        for item in found:
            counts[type(item)] += 1
            if isinstance(item, Record):
                assert len(content["pages"]) == 2
                page = content["pages"][int(item.id[-4:]) - 1]
                try:
                    check_page(page, item)
                except Exception as err:
                    raise AssertionError(f"{page}\n{item}") from err
    assert counts[Record] >= 20 and counts[Rejection] >= 20, counts
