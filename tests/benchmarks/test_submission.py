"""What a server of a benchmark is given."""

import json

from alignvlm_jax.benchmarks import predictions, tasks
from alignvlm_jax.benchmarks.predictions import Predictions


def test_ids_that_are_numbers_are_numbers(tmp_path):
    rows = [{"known_as": "337", "prediction": " ITC é "}, {"known_as": "d1/0", "prediction": ""}]
    path = tmp_path / "docvqa_test.submission.json"
    predictions.write_submission(path, Predictions({}, rows), tasks.TASKS["docvqa_test"])
    assert json.loads(path.read_text()) == [
        {"questionId": 337, "answer": "ITC é"},
        {"questionId": "d1/0", "answer": ""},
    ]
    assert list(tmp_path.iterdir()) == [path]
