"""The fields of summary.json, each from its own predictions."""

import json
import types

import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.benchmarks import summary
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION


def result(*scored: tuple[float, float]) -> Predictions:
    return Predictions({}, [{"score": score, "exact": exact} for score, exact in scored])


@pytest.fixture
def loaded():
    params = {"llm": {"head": np.zeros((3, 4))}, "connector": {"bias": np.zeros(5)}}
    config = config_lib.Config(seed=3)
    return types.SimpleNamespace(
        params=params, config=config, step=7, metadata={"train_seconds": 12.5}
    )


def test_every_split_gives_its_own_fields(loaded, tmp_path):
    results = {
        ("seen_fonts", False): result((1, 1), (0.5, 0)),
        ("seen_fonts", True): result((0, 0), (0.125, 0)),
        ("unseen_fonts", False): result((1, 1), (0.75, 0), (0, 0), (0.25, 0)),
        ("unseen_fonts", True): result((0.5, 0)),
    }
    fields = summary.summarize(loaded, ("seen_fonts", "unseen_fonts"), results)
    assert 0 < fields.pop("peak_memory_gib") < 64
    assert fields == {
        "anls": 0.75,
        "exact_match": 0.5,
        "num_eval": 2,
        "anls_blind": 0.0625,
        "anls_unseen_fonts": 0.5,
        "exact_match_unseen_fonts": 0.25,
        "num_eval_unseen_fonts": 4,
        "anls_blind_unseen_fonts": 0.5,
        "train_seconds": 12.5,
        "num_params": 17,
        "connector": "align",
        "seed": 3,
        "step": 7,
    }
    summary.write(tmp_path, fields)
    assert json.loads((tmp_path / "summary.json").read_text()) == fields
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_not_asked_has_no_field(loaded):
    fields = summary.summarize(
        loaded, ("seen_fonts", "unseen_fonts"), {("unseen_fonts", False): result((1, 1))}
    )
    assert fields["anls_unseen_fonts"] == 1
    assert not {"anls", "exact_match", "anls_blind", "anls_blind_unseen_fonts"} & set(fields)


@pytest.mark.parametrize("field", ["questions_crc32", "data", "step", "train_seconds"])
def test_blank_pages_of_other_questions_have_no_field(loaded, field):
    """An evaluation that was stopped has made the file with pages anew, and the other not yet."""
    header = {"questions_crc32": 1, "data": "0123abcd", "step": 7, "train_seconds": 12.5}
    seen, blind = (Predictions(header, result((1, 1)).rows) for _ in range(2))
    fields = summary.summarize(loaded, ("a",), {("a", False): seen, ("a", True): blind})
    assert fields["anls_blind"] == 1
    blind = Predictions(header | {field: 2}, blind.rows)
    fields = summary.summarize(loaded, ("a",), {("a", False): seen, ("a", True): blind})
    assert fields["anls"] == 1 and "anls_blind" not in fields


def test_tasks_have_a_field_of_their_own(loaded):
    row = {"answers": ["1"], "scores": {"f1": [2.0, 2.0]}}
    rows = [row, row | {"scores": {"f1": [0.0, 1.0]}, "problem": "cannot read image"}]
    of_tasks = {
        "klc": Predictions({}, rows),
        "docvqa_test": Predictions({}, [{"answers": [], "scores": {}}]),
    }
    read = [{"scores": {"bits_per_byte": [30.0, 20]}}, {"scores": {}, "problem": "no text"}]
    of_tasks["text_bpb"] = Predictions({}, [*read, {"scores": {"bits_per_byte": [10.0, 5]}}])
    fields = summary.summarize(loaded, ("seen_fonts",), {}, of_tasks)
    assert fields["tasks"] == {
        "klc": {"f1": 2 / 3, "num_eval": 2, "num_problems": 1},
        "docvqa_test": {"num_eval": 1, "num_problems": 0},
        "text_bpb": {"bits_per_byte": 1.6, "num_eval": 3, "num_problems": 1},
    }


def test_a_transcribed_split_has_its_character_error_rate(loaded):
    read = {"question": TRANSCRIBE_QUESTION, "answers": ["abcd"], "is_cut": False}
    rows = [
        read | {"prediction": "abcd", "score": 1, "exact": 1},
        read | {"prediction": "ab", "score": 0.5, "exact": 0, "is_cut": True},
    ]
    results = {("crops", False): Predictions({}, rows), ("tables", False): result((1, 1))}
    fields = summary.summarize(loaded, ("crops", "tables"), results)
    assert (fields["cer"], fields["num_cut"]) == (0.25, 1)
    assert not {"cer_tables", "num_cut_tables"} & set(fields)
