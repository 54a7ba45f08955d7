"""The file of answers that is handed in to the server of a benchmark, which alone knows the right ones."""

import json
from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.eval.predictions import Predictions
from alignvlm_jax.eval.tasks import Task


def write(path: Path, result: Predictions, task: Task) -> None:
    """Writes a JSON array of ids and answers, as the server of a benchmark takes it; ids that are numbers as such."""
    id_name, answer_name = task.submission
    entries = [
        {
            id_name: int(row["known_as"]) if row["known_as"].isdecimal() else row["known_as"],
            answer_name: task.answer(row["prediction"]),
        }
        for row in result.rows
    ]
    storage.write_whole(path, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
