import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Turn
from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.ingest.formats import files, parquet
from alignvlm_jax.ingest.formats.base import Raw, Rejection
from alignvlm_jax.ingest.formats.parquet import Parquet


def write(folder, columns, name="train-0.parquet", **options):
    pq.write_table(pa.table(columns), folder / name, **options)
    return folder / name


def raws(form, path):
    return [raw for unit in form.units(str(path)) for raw in form.raws(unit)]


def test_docvqa(tmp_path, prepare, png):
    path = write(
        tmp_path,
        {
            "questionId": ["1", "2"],
            "question": ["Why?", "How?"],
            "image": [{"bytes": png(), "path": "a.png"}, {"bytes": png(5, 5), "path": None}],
            "docId": [7, 7],
            "answers": [["So.", "Thus."], ["Well."]],
            "data_split": ["train", "train"],
        },
    )
    assert {raw.document for raw in raws(Parquet(), path)} == {"7"}
    first, second = prepare(Parquet(), path).records()
    assert (first.id, second.id) == ("1", "2") and first.turns == (
        Turn("Why?", ("So.", "Thus."), "1"),
    )
    assert second.images == (png(5, 5),)


def test_images_as_bytes_as_paths_and_as_lists(tmp_path, prepare, png):
    write(tmp_path, {"image": [png()], "query": ["Why?"], "label": [["So."]]}, "a.parquet")
    (tmp_path / "1.png").write_bytes(png(4, 4))
    by_path = {"image": [{"bytes": None, "path": "1.png"}], "query": ["How?"], "label": [["Well."]]}
    by_path["image"] = pa.array(
        by_path["image"], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    write(tmp_path, by_path, "b.parquet")
    write(
        tmp_path, {"image": [[png(), png()]], "query": ["Which?"], "label": ["Both."]}, "c.parquet"
    )
    records = prepare(Parquet(), tmp_path).records()
    assert [record.images for record in records] == [(png(),), (png(4, 4),), (png(), png())]
    assert [record.id for record in records] == ["a-0", "b-0", "c-0"]


def test_bigdocs_has_lists_of_questions(tmp_path, prepare, png):
    columns = {
        "sample_id": ["s"],
        "images": [[{"bytes": png(), "path": ""}]],
        "queries": [["a?", "b?"]],
    }
    (record,) = prepare(
        Parquet(), write(tmp_path, columns | {"annotations": [["A.", "B."]]})
    ).records()
    assert record.turns == (Turn("a?", ("A.",)), Turn("b?", ("B.",))) and record.id == "s"


def test_the_commonest_answer_is_taught_and_all_are_kept(tmp_path, prepare, png):
    columns = {
        "image": [png()],
        "question": ["?"],
        "answers": [["x", "y", "z", "y"]],
        "image_id": ["i"],
    }
    (record,) = prepare(Parquet(), write(tmp_path, columns | {"question_id": [3]})).records()
    assert record.turns[0].answers == ("y", "y", "x", "z")


def test_equal_images_are_one_document_where_no_column_says(tmp_path, png):
    columns = {"image": [png(), png(5, 5), png()], "query": ["?"] * 3, "label": [["."]] * 3}
    documents = [raw.document for raw in raws(Parquet(), write(tmp_path, columns))]
    assert documents[0] == documents[2] != documents[1]


def test_columns_by_flag(tmp_path, prepare, png):
    path = write(
        tmp_path, {"scan": [png()], "q": ["Why?"], "a": ["So."], "key": [4], "file": ["f"]}
    )
    with pytest.raises(
        UserError,
        match=r"has columns scan, q, a, key, file, .*--image_column, --question_column, --an",
    ):
        Parquet().units(str(path))
    with pytest.raises(UserError, match="no column 'scann'; did you mean 'scan'"):
        Parquet(image_column="scann").units(str(path))
    write(tmp_path, {"image": [png()], "query": ["Why?"], "label": ["So."]}, "b.parquet")
    # one that is known is enough
    assert [type(item) for item in raws(Parquet(), tmp_path)] == [Raw, Rejection]
    form = Parquet("scan", "q", "a", "key", "file")
    assert raws(form, path)[0].document == "f"
    assert prepare(form, path).records()[0].id == "4"


def test_units_are_runs_of_row_groups_and_rows_are_numbered_through(tmp_path, monkeypatch, png):
    monkeypatch.setattr(parquet, "UNIT_ROWS", 4)
    columns = {"image": [png()] * 10, "query": [str(i) for i in range(10)], "label": [["."]] * 10}
    path = write(tmp_path, columns, row_group_size=2)
    assert [(unit.start, unit.stop) for unit in Parquet().units(str(path))] == [
        (0, 2),
        (2, 4),
        (4, 5),
    ]
    assert [raw.id for raw in raws(Parquet(), path)] == [f"train-0-{i}" for i in range(10)]


def test_rows_that_cannot_be_used_shift_no_other(tmp_path, prepare, png):
    invalid = pa.array([b"ok", b"\xff\xfe", b"ok", b"ok", b"ok"]).view(pa.string())
    columns = {
        "image": [png(), png(), None, b"no image", png()],
        "question": invalid,
        "answer": ["a", "a", "a", "a", None],
    }
    prepared = prepare(Parquet(), write(tmp_path, columns))
    assert [record.id for record in prepared.records()] == ["train-0-0"]
    reasons = prepared.reasons()
    assert list(reasons) == [f"train-0-{i}" for i in (1, 2, 3, 4)]
    for number, reason in {1: "utf-8", 2: "missing", 3: "no known format", 4: "no answer"}.items():
        assert reason in reasons[f"train-0-{number}"]


def test_damaged_files_end_nothing_but_themselves(tmp_path, png):
    columns = {"image": [png()] * 8, "query": [str(i) for i in range(8)], "label": [["."]] * 8}
    whole = write(tmp_path, columns, "a.parquet", row_group_size=2).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    broken = bytearray(whole)
    broken[20:60] = b"\xff" * 40
    (tmp_path / "d.parquet").write_bytes(bytes(broken))
    items = raws(Parquet(), tmp_path)
    good = [item.id for item in items if isinstance(item, Raw)]
    assert good[:8] == [f"a-{i}" for i in range(8)] and good[-1] == "d-7"
    assert {item.id[0] for item in items if isinstance(item, Rejection)} == {"b", "c", "d"}


@pytest.mark.parametrize("where", ["opening", "reading"])
def test_a_bucket_that_does_not_answer_is_no_damaged_file(tmp_path, png, monkeypatch, where):
    write(tmp_path, {"image": [png()] * 8, "query": ["?"] * 8, "label": [["."]] * 8}, "a.parquet")
    [unit] = Parquet().units(str(tmp_path))
    err = OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)")

    def silent(*_, **__):
        raise err

    monkeypatch.setattr(filesystem, "is_remote", lambda path: True)
    if where == "opening":
        monkeypatch.setattr(filesystem, "open_file", lambda path: silent())
    else:
        monkeypatch.setattr(pq.ParquetFile, "iter_batches", silent)
    with pytest.raises(
        TryAgainError, match=r"cannot read .*UNAVAILABLE.*; the same command goes on"
    ):
        list(Parquet().raws(unit))


def test_what_images_of_rows_lie_on_may_fail_too(tmp_path, monkeypatch):
    """A local file may name images in a bucket: it is not the file that cannot be read."""
    image = {"bytes": None, "path": "gs://b/1.png"}
    write(tmp_path, {"image": [image], "query": ["?"], "label": [["."]]}, "a.parquet")
    [unit] = Parquet().units(str(tmp_path))

    def silent(*_):
        raise OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)")

    monkeypatch.setattr(filesystem, "read", silent)
    token = files.ROOTS.set(None)
    try:
        with pytest.raises(TryAgainError, match=r"cannot read gs://b/1\.png: .*UNAVAILABLE"):
            list(Parquet().raws(unit))
    finally:
        files.ROOTS.reset(token)


def test_rows_that_are_small_only_while_they_are_packed(tmp_path, prepare, png, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_UNPACKED", 100_000)
    images = [png(), bytes(200_000), png(), png()]
    columns = {"image": images, "query": ["Why?"] * 4, "label": [["So."]] * 4}
    path = write(tmp_path, columns, row_group_size=2, compression="zstd", use_dictionary=False)
    prepared = prepare(Parquet(), path)
    assert [record.id for record in prepared.records()] == ["train-0-2", "train-0-3"]
    assert "rows are too large unpacked (row group 0: 200," in prepared.reasons()["train-0-0"]


def test_numbers_of_32_bits_keep_their_digits(tmp_path, prepare, png):
    values = {
        "image": [png(shade=i) for i in range(3)],
        "question": ["How much?"] * 3,
        "answer": pa.array([0.1, 12.3, float("nan")], pa.float32()),
    }
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    prepared = prepare(Parquet(), tmp_path / "a.parquet")
    assert [one.turns[0].answers for one in prepared.records()] == [("0.1",), ("12.3",)]
    lists = values | {"answer": pa.array([[0.1], [2.5, 12.3], []], pa.list_(pa.float32()))}
    pq.write_table(pa.table(lists), tmp_path / "b.parquet")
    prepared = prepare(Parquet(), tmp_path / "b.parquet")
    assert [one.turns[0].answers for one in prepared.records()] == [("0.1",), ("2.5", "12.3")]


def test_answers_as_the_text_of_a_list_by_the_name_of_their_column(tmp_path, prepare, png):
    columns = {"image": [png(), png(5, 5)], "question": ["?", "?"]}
    path = write(tmp_path, columns | {"answers": ["['x', 'y']", '["z"]']})
    assert [record.turns[0].answers for record in prepare(Parquet(), path).records()] == [
        ("x", "y"),
        ("z",),
    ]
    path = write(tmp_path, columns | {"answer": ["['x', 'y']", "z"]}, "one.parquet")
    prepared = prepare(Parquet(), path, "other")
    assert [record.turns[0].answers for record in prepared.records()] == [("z",)]
    reason = "an answer is the text of a list, and no list (\"['x', 'y']\")"
    assert prepared.reasons() == {"one-0": reason}


@pytest.mark.parametrize("name", ["image2", "image_b", "right_image", "img_2", "page2"])
def test_a_second_column_of_images_is_told(tmp_path, png, name):
    columns = {"image": [png()], "question": ["?"], "answer": ["x"], name: [png()]}
    with pytest.raises(UserError, match=f"has more that a question may need: {name}"):
        Parquet().units(str(write(tmp_path, columns)))
