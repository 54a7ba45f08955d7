"""A perturbation follows from seed and name alone, has the same direction at every size, and is
none of size 0, in the answers as well."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.analysis import perturbation
from alignvlm_jax.analysis.perturbation import FeatureNoise, Perturbation, PixelNoise, Shift
from alignvlm_jax.benchmarks import runner
from alignvlm_jax.data import images
from alignvlm_jax.data.record import Record, Word
from alignvlm_jax.errors import UserError

SPLIT = "seen_fonts"

WORD = Word("a", (0.0, 0.0, 1.0, 1.0))


def record(name: str, *arrays: np.ndarray) -> Record:
    encoded = tuple(images.encode_png(Image.fromarray(array)) for array in arrays)
    return Record(name, "form", encoded, (), (((WORD,),),) * len(arrays))


def seen(one: Perturbation, of: Record) -> list[np.ndarray]:
    return [np.asarray(images.decode_image(image, "")).astype(int) for image in one.page(of).images]


GRAY = np.full((60, 80, 3), 128, np.uint8)


def test_noise_on_pixels():
    def noise(size: float, name: str = "a", seed: int = 0) -> np.ndarray:
        return seen(PixelNoise(size, seed), record(name, GRAY))[0] - 128

    small = noise(0.05)
    assert small.std() == pytest.approx(0.05 * 255, rel=0.03) and small.mean() == pytest.approx(
        0, abs=0.5
    )
    assert np.abs(noise(0.1) - 2 * small).max() <= 2  # Each is rounded.
    np.testing.assert_array_equal(noise(0.05), small)
    for other in (noise(0.05, "b"), noise(0.05, seed=1)):
        assert np.abs(np.corrcoef(other.ravel(), small.ravel())[0, 1]) < 0.05
    first, second = seen(PixelNoise(0.05, 0), record("a", GRAY, GRAY))
    assert np.abs(first - second).max() > 20
    loud = seen(PixelNoise(2.0, 0), record("a", GRAY))[0]  # Clipped, not wrapped around.
    assert np.isin(loud, (0, 255)).mean() > 0.7


def test_pages_that_move():
    black = np.zeros((20, 30, 3), np.uint8)
    black[4, 7] = 200
    moves = set()
    for number in range(60):
        name = f"page-{number}"
        x, y = Shift(3, 0).offset(f"{name}/0")
        moves.add((x, y))
        [moved] = seen(Shift(3, 0), record(name, black))
        expected = np.full((20 + 6, 30 + 6, 3), 255)
        expected[3 + y : 23 + y, 3 + x : 33 + x] = black
        np.testing.assert_array_equal(moved, expected[3:23, 3:33])
        # In the same direction at every size.
        assert all(
            a * b >= 0 for a, b in zip(Shift(40, 0).offset(f"{name}/0"), (x, y), strict=True)
        )
    for side in zip(*moves, strict=True):
        assert set(side) == set(range(-3, 4))
    assert len({Shift(40, seed).offset("a") for seed in range(5)}) == 5
    assert not Shift(3, 0).page(record("a", black)).lines


@pytest.mark.parametrize("kind", [Perturbation, FeatureNoise, PixelNoise, Shift])
def test_of_size_0_it_is_none(kind):
    of = record("a", GRAY)
    assert kind(0, seed=3).page(of) == of
    assert kind(0, seed=3).inputs("a") == {}


def test_noise_on_features_leaves_the_page():
    of = record("a", GRAY)
    assert FeatureNoise(3.0, 0).page(of) == of
    fields = FeatureNoise(3.0, 0).inputs("a")
    other = FeatureNoise(3.0, 0).inputs("b")
    assert fields["noise_sigma"] == 3 and fields["noise_seed"] != other["noise_seed"]
    assert PixelNoise(3.0, 0).inputs("a") == Shift(3, 0).inputs("a") == {}


def test_files_of_different_perturbations_have_different_names():
    every = [kind(size, 0) for kind in (FeatureNoise, PixelNoise, Shift) for size in (1, 2)]
    assert len({one.file for one in every}) == len({str(one.header()) for one in every}) == 6
    assert all(one.header() != dataclasses.replace(one, seed=1).header() for one in every)


def test_sigma_0_is_the_model_as_it_is(loaded):
    evaluator = runner.Runner(loaded)
    clean = evaluator.evaluate(SPLIT, blind=False)
    asked = perturbation.predict(evaluator, loaded, SPLIT, FeatureNoise(0.0, seed=0))
    assert asked.rows == clean.rows
    assert asked.header["noise"] == {"sigma": 0.0, "seed": 0}
    # It is not taken for an evaluation of the checkpoint, and whatever is large is seen.
    assert evaluator.evaluate(SPLIT, blind=False) == clean
    for loud in (FeatureNoise(100.0, 0), PixelNoise(1.0, 0), Shift(8, 0)):
        said = perturbation.predict(evaluator, loaded, SPLIT, loud).rows
        assert [row["prediction"] for row in said] != [row["prediction"] for row in clean.rows]


def test_patches_on_the_page(loaded):
    """Pages of 16 x 16 pixels make two tiles of 8 x 16, or, halved, one."""
    pages = perturbation.pages_with_questions(loaded, SPLIT)
    assert perturbation.patch_side(loaded, pages) == 4
    data = dataclasses.replace(loaded.config.data, max_tiles=1)
    one_tile = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))
    assert perturbation.patch_side(one_tile, pages) == 8
    # Of text lines the middle one: a page without any is a tile of 8 x 16, of half its size.
    lines = dataclasses.replace(loaded.config.data, tiling="lines")
    by_lines = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=lines))
    blank = images.encode_png(Image.new("RGB", (16, 16), "white"))
    assert perturbation.patch_side(by_lines, [dataclasses.replace(pages[0], images=(blank,))]) == 8
    with pytest.raises(UserError, match="no images"):
        perturbation.patch_side(loaded, [dataclasses.replace(pages[0], images=())])
