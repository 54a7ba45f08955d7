"""How far a perturbation displaces visual tokens, as cosine distances.

The distance alone deceives: where all patches share a large mean vector, which a flat softmax over
a vocabulary gives, it is small because *every* distance is. So beside it stands the distance
between different tokens, unperturbed, and both once more after that mean is taken off.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from alignvlm_jax.analysis.perturbation import Perturbation
from alignvlm_jax.data.record import Record
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.shapes import Array, Float


def measure(
    loaded: Loaded, pages: Sequence[Record], perturbations: Sequence[Perturbation]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Returns the mean distance between different visual tokens, unperturbed, and for each
    perturbation that of a token from itself unperturbed; `centred` ones with the mean unperturbed
    token taken off both."""
    clean = visual_tokens(loaded, pages, Perturbation(0, seed=0))  # float32 [tokens, D]
    mean = clean.mean(0)
    between = {
        "between_distance": between_distance(clean),
        "centred_between_distance": between_distance(clean - mean),
    }
    displaced = []
    for one in perturbations:
        noisy = visual_tokens(loaded, pages, one) if one.size else clean
        displaced.append(
            {
                "distance": float(cosine_distances(clean, noisy).mean()),
                # The clean mean for both: what the perturbation adds to all tokens alike counts.
                "centred_distance": float(cosine_distances(clean - mean, noisy - mean).mean()),
            }
        )
    return between, displaced


def visual_tokens(
    loaded: Loaded, pages: Sequence[Record], perturbation: Perturbation
) -> np.ndarray:
    """Returns what the connector makes of pages, perturbed, float32 [tokens, D]."""
    tiles = tiles_lib.tiles_of(loaded, [perturbation.page(page) for page in pages])
    # A tile a row, each with a name and so noise of its own; no fields where nothing is perturbed
    # within the model.
    rows = [perturbation.inputs(f"tile {index}") for index in range(len(tiles))]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return _flat(tiles_lib.map_tiles(loaded, _visual_tokens, {"tiles": tiles, **fields}))


def feature_std(loaded: Loaded, pages: Sequence[Record]) -> float:
    """Returns `signal_std` of the vision features of pages."""
    tiles = tiles_lib.tiles_of(loaded, pages)
    return signal_std(_flat(tiles_lib.map_tiles(loaded, _features, {"tiles": tiles})))


def signal_std(features: np.ndarray) -> float:
    """Returns the standard deviation of features [n, E] over patches, the root of its mean square
    over channels: what is the same in all patches is no signal."""
    return float(np.sqrt(np.float64(features).var(0).mean()))


def cosine_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns 1 - cos of each row of a [n, D] and the same row of b, float64 [n]; 1 where a row is
    zero."""
    # Rounding leaves equal rows a little below 0.
    return np.maximum(1 - (_unit(a) * _unit(b)).sum(-1), 0)


def between_distance(tokens: np.ndarray) -> float:
    """Returns the mean cosine distance of two different rows of tokens [n, D], over all pairs; 0 of
    a single row."""
    unit = _unit(tokens)
    pairs = len(unit) * (len(unit) - 1)
    if not pairs:
        return 0.0
    # No [n, n] matrix of pairs: their cosines sum to the squared length of the sum of unit vectors,
    # less the rows with themselves.
    return float(1 - ((unit.sum(0) ** 2).sum() - (unit**2).sum()) / pairs)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows [n, D] at length 1, float64; zeros stay zeros."""
    rows = np.float64(rows)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _flat(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Vectors of all parts, float32 [n, width]."""
    return np.concatenate([np.float32(part).reshape(-1, part.shape[-1]) for part in parts])


def _features(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> Float[Array, "B I P E"]:
    return model.apply(variables, batch, method="features")


def _visual_tokens(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> Float[Array, "B N D"]:
    return model.apply(variables, batch, method="visual_tokens")
