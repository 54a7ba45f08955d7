"""What patches say: boxes that cover the page, probabilities of the model, entropies in bits."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from alignvlm_jax import config as config_lib
from alignvlm_jax.data import images, tiling
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading, patch_tokens, tiles
from alignvlm_jax.parallel import mesh as mesh_lib


@pytest.fixture(scope="module")
def loaded(trained_workdir):
    return loading.load(trained_workdir, loading.load_config(trained_workdir))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_data(loaded, **fields):
    data = dataclasses.replace(loaded.config.data, **fields)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))


# Two tiles that fit; a page that is scaled and leaves a part of its tiles empty; one tile.
PAGES = [noise(16, 16), noise(45, 39), noise(16, 8)]


def assert_cover_once(page: Image.Image, boxes: np.ndarray):
    y, x = np.mgrid[: page.height, : page.width] + 0.5
    left, top, right, bottom = boxes.T[:, :, None, None]
    assert (((left <= x) & (x < right) & (top <= y) & (y < bottom)).sum(0) == 1).all()


def test_boxes_cover_the_page_once_and_probabilities_are_those_of_its_tiles(loaded):
    vocab = loaded.config.model.llm.unpadded_vocab_size
    looks = patch_tokens.lenses(loaded, PAGES, num_tokens=vocab)
    cut = [images.tile_image(page, loaded.config.model.vision, 2, False).pixels for page in PAGES]
    pixels = np.concatenate(cut)
    whole = jax.jit(
        lambda params, batch: loaded.model.apply(
            {"params": params}, batch, method="patch_probabilities"
        )
    )
    with mesh_lib.use(loaded.mesh):
        expected = np.split(
            np.asarray(whole(loaded.params, {"tiles": pixels[:, None]}))[:, 0],
            np.cumsum([len(t) for t in cut])[:-1],
        )
    for look, page in zip(looks, PAGES, strict=True):
        assert look.page is page and not look.is_overview.any() and look.vocab_size == vocab
        assert_cover_once(page, look.boxes)
        assert (np.diff(look.probabilities) <= 0).all()
        np.testing.assert_allclose(look.probabilities.sum(-1), 1, atol=1e-5)
        p = look.probabilities.astype(float)
        np.testing.assert_allclose(
            look.entropies, -(p * np.log2(np.maximum(p, 1e-30))).sum(-1), atol=1e-4
        )
    # All their patches are drawn.
    for look, p_TPV in ((looks[0], expected[0]), (looks[2], expected[2])):
        p_NV = p_TPV.reshape(len(look), -1)
        np.testing.assert_allclose(
            np.take_along_axis(p_NV, look.tokens, -1), look.probabilities, atol=1e-6
        )


def test_a_page_by_its_text_lines_is_seen_there(loaded):
    page = Image.new("RGB", (100, 60), "white")
    ImageDraw.Draw(page).rectangle([10, 20, 48, 31], fill="black")
    other = with_data(loaded, tiling="lines", max_tiles=4)
    [lens] = patch_tokens.lenses(other, [page])
    cut = tiling.tile_page(page, loaded.config.model.vision, other.config.data)
    assert lens.boxes[:, 1].min() == cut.crops[0, 1] > 10 and not lens.is_overview.any()
    np.testing.assert_array_equal(lens.boxes[:, 2].max(), cut.crops[-1, 2])
    with pytest.raises(UserError, match=r"the page has 1 line in 2 tiles of .*max_tiles is 1$"):
        patch_tokens.lenses(with_data(loaded, tiling="lines", max_tiles=1), [page])


def test_gives_as_many_tokens_as_asked_for(loaded):
    [few] = patch_tokens.lenses(loaded, PAGES[:1], 3)
    [all_of_them] = patch_tokens.lenses(loaded, PAGES[:1], 10**6)
    assert few.tokens.shape == (16, 3) and all_of_them.tokens.shape == (16, few.vocab_size)
    np.testing.assert_array_equal(few.tokens, all_of_them.tokens[:, :3])


def test_the_overview_covers_the_page_once_more(loaded):
    page = noise(32, 8)
    [look] = patch_tokens.lenses(with_data(loaded, max_tiles=3, use_overview=True), [page])
    assert 0 < look.is_overview.sum() < len(look)
    assert_cover_once(page, look.boxes[look.is_overview])
    assert_cover_once(page, look.detail().boxes)


def test_a_page_has_the_tiles_that_a_question_would_have(loaded):
    [look] = patch_tokens.lenses(with_data(loaded, max_tiles=9, record_tiles=1), [noise(64, 32)])
    assert len(look) == loaded.config.model.vision.num_patches


def test_a_connector_without_a_distribution_says_so(loaded):
    model = dataclasses.replace(loaded.config.model, connector=config_lib.connector("mlp"))
    other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=model))
    with pytest.raises(UserError, match="'mlp' gives patches no distribution"):
        patch_tokens.lenses(other, [])
    model = dataclasses.replace(
        loaded.config.model, connector=config_lib.connector(weights="linear")
    )
    other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=model))
    with pytest.raises(
        UserError, match="'align' with weights 'linear' gives patches no distribution"
    ):
        patch_tokens.lenses(other, [])


def test_a_second_page_is_not_compiled_again(loaded):
    """In a notebook one looks at many."""
    patch_tokens.lenses(loaded, [PAGES[0]], num_tokens=3)
    before = tiles._jitted.cache_info().misses
    patch_tokens.lenses(loaded, [PAGES[2]], num_tokens=3)
    assert tiles._jitted.cache_info().misses == before
