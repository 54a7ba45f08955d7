"""Feature displacement: how far a perturbation moves visual tokens, as cosine distances.

The distance alone misleads: if all patches have a large mean vector in common, as a flat softmax
over a vocabulary gives, it is small because *every* distance is. So the distance between different
unperturbed tokens is measured as well, and both once more after that mean is subtracted.
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
    """Returns mean cosine distances between visual tokens of pages.

    Args:
      loaded: the model.
      pages: records whose images are used.
      perturbations: the perturbations to measure.

    Returns:
      The distance between different unperturbed tokens, and for each perturbation the distance of
      a token from the same token unperturbed. `centred` ones are measured with the mean unperturbed
      token subtracted from both.
    """
    clean = visual_tokens(loaded, pages, Perturbation(0, seed=0))  # float32 [tokens, D]
    mean = clean.mean(0)
    between = {
        "between_distance": between_distance(clean),
        "centred_between_distance": between_distance(clean - mean),
    }
    displaced = []
    for one in perturbations:
        # With size 0 tokens are the same, and a distance of exactly 0 need not be computed.
        noisy = visual_tokens(loaded, pages, one) if one.size else clean
        displaced.append(
            {
                "distance": float(cosine_distances(clean, noisy).mean()),
                # The clean mean for both: a displacement that is common to all tokens counts.
                "centred_distance": float(cosine_distances(clean - mean, noisy - mean).mean()),
            }
        )
    return between, displaced


def visual_tokens(
    loaded: Loaded, pages: Sequence[Record], perturbation: Perturbation
) -> np.ndarray:
    """Returns the visual tokens of perturbed pages, float32 [tokens, D]."""
    tiles = tiles_lib.tiles_of(loaded, [perturbation.page(page) for page in pages])
    # Each tile is a row with a name of its own, and so with noise of its own. There are no fields
    # if nothing is perturbed within the model.
    rows = [perturbation.inputs(f"tile {index}") for index in range(len(tiles))]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return _flat(tiles_lib.map_tiles(loaded, _visual_tokens, {"tiles": tiles, **fields}))


def feature_std(loaded: Loaded, pages: Sequence[Record]) -> float:
    """Returns the standard deviation of the vision features of pages, as `signal_std` has it."""
    tiles = tiles_lib.tiles_of(loaded, pages)
    return signal_std(_flat(tiles_lib.map_tiles(loaded, _features, {"tiles": tiles})))


def signal_std(features: np.ndarray) -> float:
    """Returns the standard deviation of features [n, E] over n patches.

    It is the root of the mean over channels of the variance over patches: a value that is the same
    in all patches is no signal.
    """
    # [n, E] -> a variance for each channel -> their mean, and its root.
    return float(np.sqrt(np.float64(features).var(0).mean()))


def cosine_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine distance of each row of a [n, D] to the same row of b [n, D], float64 [n].

    The distance is 1 - cosine, in [0, 2]; it is 1 if a row is zero.
    """
    # Rounding leaves equal rows a little below 0.
    return np.maximum(1 - (unit(a) * unit(b)).sum(-1), 0)


def between_distance(tokens: np.ndarray) -> float:
    """Returns the mean cosine distance over all pairs of different rows of tokens [n, D].

    It is 0 for a single row.
    """
    units = unit(tokens)
    pairs = len(units) * (len(units) - 1)
    if not pairs:
        return 0.0
    # No [n, n] matrix of pairs: their cosines sum to the squared length of the sum of unit vectors,
    # less the rows with themselves.
    return float(1 - ((units.sum(0) ** 2).sum() - (units**2).sum()) / pairs)


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows [n, D] scaled to length 1, float64 [n, D]; zero rows stay zero."""
    rows = np.float64(rows)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _flat(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the vectors of all parts [..., width] in one array, float32 [n, width]."""
    return np.concatenate([np.float32(part).reshape(-1, part.shape[-1]) for part in parts])


def _features(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> Float[Array, "B I P E"]:
    return model.apply(variables, batch, method="features")


def _visual_tokens(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> Float[Array, "B M D"]:
    return model.apply(variables, batch, method="visual_tokens")
