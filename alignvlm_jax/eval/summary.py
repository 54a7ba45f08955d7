"""The scores of a checkpoint in a few numbers: `summary.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from alignvlm_jax import storage
from alignvlm_jax.eval.loading import Loaded
from alignvlm_jax.eval.predictions import Predictions
from alignvlm_jax.train import metrics

FILE = "summary.json"


def summarize(
    loaded: Loaded,
    splits: Sequence[str],
    results: Mapping[tuple[str, bool], Predictions],
    of_tasks: Mapping[str, Predictions] | None = None,
) -> dict[str, Any]:
    """Returns what summary.json holds.

    Args:
      loaded: the model.
      splits: the first one's scores have plain names (`anls`), the others' end in the split (`anls_unseen_fonts`).
      results: predictions by split and blind; those missing leave their fields out.
      of_tasks: predictions by task, which make the field `tasks`; there is none where there are none.
    """
    fields: dict[str, Any] = {}
    for split in splits:
        end = "" if split == splits[0] else f"_{split}"
        if (split, False) in results:
            asked = results[split, False]
            fields |= {f"anls{end}": asked.mean("score"), f"exact_match{end}": asked.mean("exact")}
            fields[f"num_eval{end}"] = len(asked.rows)
        if (split, True) in results:
            fields[f"anls_blind{end}"] = results[split, True].mean("score")
    if of_tasks:
        fields["tasks"] = {name: _of_task(result) for name, result in of_tasks.items()}
    return fields | {
        "train_seconds": loaded.metadata["train_seconds"],
        "num_params": sum(x.size for x in jax.tree.leaves(loaded.params)),
        "connector": loaded.config.model.connector.name,
        "seed": loaded.config.seed,
        "step": loaded.step,
        "peak_memory_gib": metrics.peak_memory_gib(),
    }


def _of_task(result: Predictions) -> dict[str, Any]:
    """Scores of the questions whose answers are known; none where the split does not tell them."""
    totals = result.statistics()
    scores = {name: totals.score(name) for name in totals.weights}
    return scores | {"num_eval": len(result.rows), "num_problems": len(result.problems())}


def write(workdir: Path, fields: Mapping[str, Any]) -> None:
    """Writes summary.json, beside it first."""
    storage.write_whole(workdir / FILE, json.dumps(fields, indent=2) + "\n")
