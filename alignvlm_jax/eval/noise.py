"""How much noise on the vision features a connector bears (arXiv 2502.01341, section 5.4).

Gaussian noise joins the features just before the connector. Two things are measured: the scores of the answers, and how
far the connector's output moves, as a cosine distance. That distance alone deceives: where all patches share a large
mean vector, which a flat softmax over a vocabulary gives, it is small because *every* distance is. So beside it stands
the distance between different patches without noise, and both once more after that mean is taken off.

The paper's noise has sigma 3 on features whose scale it does not tell. Sigmas are therefore also given in units of the
features' standard deviation, which compare between models.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignvlm_jax.data import sources
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import analysis
from alignvlm_jax.eval.loading import Loaded
from alignvlm_jax.eval.predictions import Predictions
from alignvlm_jax.eval.questions import Question, choose_questions
from alignvlm_jax.eval.runner import Runner, Trial
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class Noise:
    """Gaussian noise of standard deviation `sigma`. The same `seed` gives the same noise at every sigma, but for its
    size, so that a curve over sigmas is smooth."""

    sigma: float
    seed: int

    def fields(self, name: str) -> dict[str, np.ndarray]:
        """Returns what makes the model add it to the row of this name; rows of different names get other noise. Of
        sigma 0 nothing: adding it would be another program, which rounds otherwise."""
        if not self.sigma:
            return {}
        seed = zlib.crc32(f"{self.seed}/{name}".encode())
        return {"noise_sigma": np.float32(self.sigma), "noise_seed": np.uint32(seed)}


@dataclasses.dataclass(frozen=True)
class Point:
    """What noise of one sigma does. Distances are means over visual tokens, of their values with and without noise;
    `centred` with the mean token of the clean pages taken off both."""

    sigma: float
    relative_sigma: float
    anls: float
    exact_match: float
    num_eval: int
    distance: float
    centred_distance: float


def measure(
    loaded: Loaded, split: str, sigmas: Sequence[float], relative_sigmas: Sequence[float], num_pages: int, seed: int
) -> dict[str, Any]:
    """Returns the points, the first without noise, in the order of their sigmas, and what they are compared with.

    Args:
      loaded: the model; its config says where the split is and how many questions are asked.
      split: of the documents.
      sigmas: of the noise, in the unit of the features.
      relative_sigmas: in units of `feature_std`.
      num_pages: documents, of those asked about, whose features and visual tokens are compared.
      seed: of the noise.

    Raises:
      UserError: the split is missing, has no questions or no images.
    """
    records = sources.RecordSource(loaded.config.data.dir, split)
    questions = choose_questions(records, loaded.config.eval.num_questions)
    if not questions:
        raise UserError(f"split {split!r} in {loaded.config.data.dir} has no questions")
    chosen = sorted({question.record for question in questions})[:num_pages]
    tiles = analysis.tiles_of(loaded, [records[index] for index in chosen])
    feature_std = signal_std(_flat(analysis.map_tiles(loaded, _features, {"tiles": tiles})))
    clean = visual_tokens(loaded, tiles, Noise(0.0, seed))
    asker = Runner(loaded, loaded.config)
    points = []
    for sigma in sorted({0.0, *sigmas, *(relative * feature_std for relative in relative_sigmas)}):
        noise = Noise(sigma, seed)
        result = ask(asker, loaded, split, noise)
        noisy = clean if sigma == 0 else visual_tokens(loaded, tiles, noise)
        points.append(_point(noise, feature_std, result, clean, noisy))
    return {
        "feature_std": feature_std,
        "num_pages": len(chosen),
        "between_distance": between_distance(clean),
        "centred_between_distance": between_distance(clean - clean.mean(0)),
        "points": [dataclasses.asdict(point) for point in points],
    }


def ask(asker: Runner, loaded: Loaded, split: str, noise: Noise) -> Predictions:
    """Returns the answers to a split's questions, asked through noise; they stay in analysis/noise/ of the workdir."""

    def inputs(question: Question) -> dict[str, np.ndarray]:
        return noise.fields(question.id)

    path = analysis.folder(loaded) / "noise" / f"{split}_sigma_{noise.sigma:.6g}.jsonl"
    header = {"noise": {"sigma": noise.sigma, "seed": noise.seed}}
    return asker.evaluate_trial(split, Trial(path, header, inputs=inputs), f"{split}, noise {noise.sigma:.3g}")


def visual_tokens(loaded: Loaded, tiles: np.ndarray, noise: Noise) -> np.ndarray:
    """Returns what the connector makes of tiles [n, Y, X, C] through noise, float32 [tokens, D]."""
    rows = [noise.fields(f"tile {index}") for index in range(len(tiles))]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return _flat(analysis.map_tiles(loaded, _visual_tokens, {"tiles": tiles, **fields}))


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


def _point(noise: Noise, feature_std: float, result: Predictions, clean: np.ndarray, noisy: np.ndarray) -> Point:
    mean = clean.mean(0)
    return Point(
        sigma=noise.sigma,
        relative_sigma=noise.sigma / feature_std,
        anls=result.mean("score"),
        exact_match=result.mean("exact"),
        num_eval=len(result.rows),
        distance=float(cosine_distances(clean, noisy).mean()),
        centred_distance=float(cosine_distances(clean - mean, noisy - mean).mean()),
    )


def _flat(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Vectors of all parts, float32 [n, width]."""
    return np.concatenate([np.float32(part).reshape(-1, part.shape[-1]) for part in parts])


def _features(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B I P E"]:
    return model.apply(variables, batch, method="features")


def _visual_tokens(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B N D"]:
    return model.apply(variables, batch, method="visual_tokens")
