import pytest

from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.hub import filters
from alignvlm_jax.ingest.formats.parquet import Parquet
from tests.ingest.formats.hub import public_sets
from tests.ingest.formats.hub.public_sets import ROWS


@pytest.mark.parametrize(
    ("text", "kept"),
    {
        "image_correspondence_min>=4": ["cocoqa"],
        "image_correspondence_min < 4": ["text_sums"],
        "relevance_min>=4, formatting_min<=3": ["cocoqa", "text_sums"],
        "source=cocoqa": ["cocoqa"],
        "source != 'cocoqa',relevance_min>3.5": ["text_sums"],
        "image_correspondence_min==5": ["cocoqa"],
        "": ["cocoqa", "text_sums"],
    }.items(),
)
def test_rows_are_kept_by_their_ratings(text, kept, tmp_path, prepare):
    path = public_sets.write_rows(tmp_path / "a.parquet", ROWS["FineVision"])
    prepared = prepare(Parquet(filter=text), path)
    assert [record.source for record in prepared.records()] == kept
    assert len(prepared.rejected()) == 2 - len(kept)
    for reason in prepared.reasons().values():
        assert reason.startswith("left out by --filter=")


@pytest.mark.parametrize(
    ("text", "reason"),
    {
        "image_correspondence_min": "no COLUMN OP VALUE as image_correspondence_min>=4; OP is one",
        "a>=": "no COLUMN OP VALUE",
        "a>=4,": "no COLUMN OP VALUE",
        ">=4": "no COLUMN OP VALUE",
        "a=>4": "no COLUMN OP VALUE",
        "a>=b": "compares 'a' by >= with 'b', no number",
        "a>nan": "with 'nan', no number",
        "__import__('os').system('x')": "no COLUMN OP VALUE",
    }.items(),
)
def test_what_is_no_filter_is_refused_before_anything_is_read(text, reason):
    with pytest.raises(UsageError, match=reason):
        Parquet(filter=text)


@pytest.mark.parametrize(
    ("text", "reason"),
    {
        "image_corespondence_min>=4": "no column 'image_corespondence_min'; did you mean "
        "'image_correspondence_min'",
        "relevance_ratings>=4": r"'relevance_ratings' .* is list<.*, neither a number nor a text"
        "; did you mean 'relevance_min'",
        "texts=4": "neither a number nor a text",
    }.items(),
)
def test_columns_that_do_not_compare_are_refused(text, reason, tmp_path):
    path = public_sets.write_rows(tmp_path / "a.parquet", ROWS["FineVision"])
    with pytest.raises(UserError, match=reason):
        Parquet(filter=text).units(str(path))


@pytest.mark.parametrize("value", [None, float("nan"), "4", True, [4], b"4"])
def test_values_that_do_not_compare_are_rejected(value):
    [condition] = filters.parse("a>=4")
    with pytest.raises(Reject, match="the filter a>=4 cannot compare"):
        condition.holds(value)


def test_a_row_without_a_rating_is_told(tmp_path, prepare):
    rows = [row | {"relevance_min": None} for row in ROWS["FineVision"][:1]]
    path = public_sets.write_rows(tmp_path / "a.parquet", [*ROWS["FineVision"], *rows])
    prepared = prepare(Parquet(filter="relevance_min>=1"), path)
    assert prepared.reasons() == {"a-2": "the filter relevance_min>=1 cannot compare a NoneType"}
