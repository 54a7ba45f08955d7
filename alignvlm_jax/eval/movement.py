"""How far a disturbance moves what the connector hands on, in cosine distances."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from alignvlm_jax.data.schema import Record
from alignvlm_jax.eval import analysis
from alignvlm_jax.eval.disturbance import Disturbance
from alignvlm_jax.eval.loading import Loaded
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.shapes import Array, Float


def measure(
    loaded: Loaded, pages: Sequence[Record], trials: Sequence[Disturbance]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Returns the mean distance of different visual tokens, undisturbed, and for each trial that of a token from itself
    undisturbed; `centred` ones with the mean undisturbed token taken off both."""
    clean = visual_tokens(loaded, pages, Disturbance(0, seed=0))
    mean = clean.mean(0)
    between = {
        "between_distance": between_distance(clean),
        "centred_between_distance": between_distance(clean - mean),
    }
    moved = []
    for trial in trials:
        noisy = visual_tokens(loaded, pages, trial) if trial.size else clean
        moved.append(
            {
                "distance": float(cosine_distances(clean, noisy).mean()),
                "centred_distance": float(cosine_distances(clean - mean, noisy - mean).mean()),
            }
        )
    return between, moved


def visual_tokens(loaded: Loaded, pages: Sequence[Record], disturbance: Disturbance) -> np.ndarray:
    """Returns what the connector makes of pages, disturbed, float32 [tokens, D]."""
    tiles = analysis.tiles_of(loaded, [disturbance.page(page) for page in pages])
    rows = [disturbance.inputs(f"tile {index}") for index in range(len(tiles))]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return _flat(analysis.map_tiles(loaded, _visual_tokens, {"tiles": tiles, **fields}))


def feature_std(loaded: Loaded, pages: Sequence[Record]) -> float:
    """Returns `signal_std` of the vision features of pages."""
    tiles = analysis.tiles_of(loaded, pages)
    return signal_std(_flat(analysis.map_tiles(loaded, _features, {"tiles": tiles})))


def signal_std(features: np.ndarray) -> float:
    """Returns the standard deviation of features [n, E] over patches, the root of its mean square over channels: what
    is the same in all patches is no signal."""
    return float(np.sqrt(np.float64(features).var(0).mean()))


def cosine_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns 1 - cos of each row of a [n, D] and the same row of b, float64 [n]; 1 where a row is zero."""
    return np.maximum(1 - (_unit(a) * _unit(b)).sum(-1), 0)  # Rounding leaves equal rows a little below 0.


def between_distance(tokens: np.ndarray) -> float:
    """Returns the mean cosine distance of two different rows of tokens [n, D], over all pairs; 0 of a single row.

    All pairs need no matrix of pairs: their cosines sum to the squared length of the sum of unit vectors, less the
    rows with themselves.
    """
    unit = _unit(tokens)
    pairs = len(unit) * (len(unit) - 1)
    if not pairs:
        return 0.0
    return float(1 - ((unit.sum(0) ** 2).sum() - (unit**2).sum()) / pairs)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.float64(rows)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _flat(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Vectors of all parts, float32 [n, width]."""
    return np.concatenate([np.float32(part).reshape(-1, part.shape[-1]) for part in parts])


def _features(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B I P E"]:
    return model.apply(variables, batch, method="features")


def _visual_tokens(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B N D"]:
    return model.apply(variables, batch, method="visual_tokens")
