import base64

import pytest

from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.hub import cells
from tests.ingest.formats.hub.public_sets import cell, picture

NOISE = bytes(range(256)) * 20


def test_images_in_all_ways_that_cells_hold_them(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(1))
    encoded = base64.b64encode(picture(2)).decode()
    found = [
        picture(3),
        cell(4),
        {"bytes": None, "path": "1.png"},
        "1.png",
        f"data:image/png;base64,{encoded}",
        base64.b64encode(NOISE).decode(),
    ]
    read = [picture(3), picture(4), picture(1), picture(1), picture(2), NOISE]
    assert cells.images(found, str(tmp_path)) == read
    for one, data in zip(found, read, strict=True):
        assert cells.images(one, str(tmp_path)) == [data]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, r"the image is missing \(NoneType in its column"),
        ([], "an empty list in its column"),
        (
            [picture(1), None],
            "NoneType in its column, number 1 of 2, where bytes, a path or base64",
        ),
        ({"bytes": None, "path": None}, "the image is missing"),
        ({"url": "1.png"}, "the image is missing .dict"),
        ("none.png", r"an image is missing \(none.png\)"),
        ("https://example.com/1.png", "neither local nor on gs://"),
        ("data:image/png;base64,?", "no base64"),
        (3, "int in its column"),
        ([[picture(1)]], "list in its column"),
    ],
)
def test_an_image_that_is_missing_is_told(value, reason, tmp_path):
    with pytest.raises(Reject, match=reason):
        cells.images(value, str(tmp_path))


def test_only_what_a_set_says_stands_for_a_record_of_text():
    for value in (None, {"bytes": None, "path": None}):
        assert cells.images(value, "", "null") == []
        with pytest.raises(Reject):
            cells.images(value, "", "empty")
    assert cells.images([], "", "empty") == []
    for value, without in (([], "null"), ([None], "null"), ([None], "empty"), ({"a": 1}, "null")):
        with pytest.raises(Reject):
            cells.images(value, "", without)


def test_pages_end_where_the_last_one_is():
    pages = [cell(1), cell(2), None, {"bytes": None, "path": None}]
    assert cells.pages(pages, "") == [picture(1), picture(2)]
    with pytest.raises(Reject, match=r"page 2 is missing \(2 of 3 are there"):
        cells.pages([cell(1), None, cell(2)], "")
    with pytest.raises(Reject, match="page 1 is missing"):
        cells.pages([None, None], "")


def test_images_have_a_size_together(monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 200)
    with pytest.raises(Reject, match=r"too large together \(at most 200 bytes"):
        cells.images([picture(1), bytes(150)], "")
