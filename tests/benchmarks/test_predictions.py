"""A predictions file can be interrupted anywhere and goes on, but only under the same header."""

import json

import pytest

from alignvlm_jax.benchmarks import predictions
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UserError

HEADER = {"checkpoint": "runs/a/checkpoints/7", "step": 7, "blind": False}


def row(index: int, **changes) -> dict:
    fields = {
        "id": f"d{index}#0",
        "record": index,
        "question": "Total?",
        "answers": ["1 é"],
        "prediction": "1 é",
    }
    return fields | {"score": 1.0, "exact": 1.0, "kind": "form"} | changes


def test_a_finished_file_is_read_back(tmp_path):
    path = predictions.path_of(tmp_path, "seen_fonts", blind=False)
    writer = predictions.Writer(path, HEADER)
    writer.append([row(0), row(1)])
    assert not path.exists()
    writer.publish()
    assert [file.name for file in path.parent.iterdir()] == ["seen_fonts.jsonl"]
    assert predictions.read(path) == predictions.Predictions(HEADER, [row(0), row(1)])


def test_an_interrupted_file_goes_on_without_its_half_written_line(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = predictions.Writer(path, HEADER)
    writer.append([row(0), row(1)])
    partial = tmp_path / "a.jsonl.partial"
    partial.write_text(partial.read_text() + '{"id": "d2#0", "pred')
    writer = predictions.Writer(path, HEADER)
    assert writer.predictions.rows == [row(0), row(1)]
    writer.append([row(2)])
    assert writer.publish().rows == predictions.read(path).rows == [row(0), row(1), row(2)]


def test_another_header_starts_anew(tmp_path):
    writer = predictions.Writer(tmp_path / "a.jsonl", HEADER)
    writer.append([row(0)])
    writer = predictions.Writer(tmp_path / "a.jsonl", HEADER | {"step": 8})
    assert writer.predictions.rows == []
    assert (tmp_path / "a.jsonl.partial").read_text() == json.dumps(HEADER | {"step": 8}) + "\n"


def test_missing_empty_and_damaged_files(tmp_path):
    assert predictions.read(tmp_path / "none.jsonl") is None
    (tmp_path / "empty.jsonl").write_text('{"step"')
    assert predictions.read(tmp_path / "empty.jsonl") is None
    (tmp_path / "damaged.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match=r"damaged\.jsonl is damaged"):
        predictions.read(tmp_path / "damaged.jsonl")


def test_means_by_kind():
    scored = [
        row(0, score=0.5),
        row(1),
        row(2, score=0.0, kind="table"),
        row(3, score=0.5, kind="receipt"),
    ]
    result = predictions.Predictions(HEADER, scored)
    assert result.kinds() == ["form", "receipt", "table"]
    assert result.mean("score") == 0.5
    assert result.of_kind("form").mean("score") == 0.75
    # Scores 0, 0.5, 0.5, 1: standard deviation sqrt(1/8); of the mean of four, half that.
    assert result.margin("score") == pytest.approx(1.96 * (1 / 8) ** 0.5 / 2)


def test_the_character_error_rate_is_that_of_all_transcriptions_together():
    read = {"question": TRANSCRIBE_QUESTION}
    rows = [
        row(0, **read, answers=["abcdefgh"], prediction="abcdefgh"),
        row(1, **read, answers=["ab"], prediction="xy"),
        row(2, prediction="nonsense"),
    ]
    # By character, not by answer: 2 of 10, where the mean over answers is a half.
    assert predictions.Predictions({}, rows).character_error_rate() == 0.2
    assert predictions.Predictions({}, rows[2:]).character_error_rate() is None


def test_cut_answers_are_counted_where_it_was_written_down():
    rows = [row(0, is_cut=True), row(1, is_cut=False), row(2, is_cut=True)]
    assert predictions.Predictions({}, rows).num_cut() == 2
    assert predictions.Predictions({}, [row(0)]).num_cut() is None
