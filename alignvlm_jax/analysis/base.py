"""What the analyses of a trained model share: the file that each of them leaves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax import storage
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.loading import Loaded

FOLDER = "analysis"


def folder(loaded: Loaded) -> Path:
    """Returns where analyses of a checkpoint are written."""
    return loading.workdir_of(loaded.path) / FOLDER


def write(
    loaded: Loaded, name: str, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> Path:
    """Writes analysis/NAME.json: what was looked at, how (with the seed), and what was found.

    Returns its path.
    """
    fields = {
        "analysis": name,
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "train_seconds": loaded.metadata["train_seconds"],
        "connector": loaded.config.model.connector.name,
        "settings": dict(settings),
        **results,
    }
    path = folder(loaded) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    storage.write_whole(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    return path


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Returns the mean of values and what 5, 50 and 95 % of them lie below."""
    cuts = dict(zip(("p5", "p50", "p95"), np.percentile(values, (5, 50, 95)).tolist(), strict=True))
    return {"mean": float(values.mean()), **cuts}
