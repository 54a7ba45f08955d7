"""What patches say: boxes that cover the page, probabilities of the model, entropies in bits."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data import images, pages
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import lens, loading, runner


@pytest.fixture(scope="module")
def loaded(trained_workdir):
    return loading.load(trained_workdir, loading.load_config(trained_workdir))


def with_page(record, width: int, height: int):
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return dataclasses.replace(record, images=(pages.encode_png(Image.fromarray(noise)),))


def test_boxes_cover_the_page_once_and_probabilities_are_those_of_its_tiles(loaded):
    source = runner.sources.RecordSource(loaded.config.data.dir, "seen_fonts")
    # Two tiles that fit; a page that is scaled and leaves a part of its tiles empty.
    records = [source[0], with_page(source[1], 45, 39)]
    looks = lens.look(loaded.model, loaded.params, loaded.mesh, loaded.config, records)
    assert len(looks) == 2
    for look, record in zip(looks, records, strict=True):
        assert look.page.size == images.decode_image(record.images[0], "").size
        covered = np.zeros((look.page.height, look.page.width), int)
        for x, y in np.ndindex(look.page.width, look.page.height):
            left, top, right, bottom = look.boxes.T
            covered[y, x] = ((left <= x + 0.5) & (x + 0.5 < right) & (top <= y + 0.5) & (y + 0.5 < bottom)).sum()
        assert (covered == 1).all()
        np.testing.assert_allclose(look.probabilities.sum(-1), 1, atol=1e-5)
        assert look.probabilities.shape == (len(look.boxes), loaded.config.model.llm.vocab_size)
    # Patches of noise differ, and so do those of the two pages.
    assert len(np.unique(looks[0].probabilities.round(6), axis=0)) == len(looks[0].boxes)
    assert not np.allclose(looks[0].probabilities[0], looks[1].probabilities[0], atol=1e-3)


def test_a_connector_without_a_distribution_says_so(loaded):
    connector = dataclasses.replace(loaded.config.model.connector, name="mlp")
    model = dataclasses.replace(loaded.config.model, connector=connector)
    with pytest.raises(UserError, match="'mlp' gives patches no distribution"):
        lens.look(loaded.model, loaded.params, loaded.mesh, dataclasses.replace(loaded.config, model=model), [])


@pytest.fixture
def drawn(loaded):
    """Three patches: certain of "7", wavering between "1" and "l", ignorant; and a blank one."""
    vocab = loaded.tokenizer.vocab_size
    seven, one, small_l = (loaded.tokenizer.encode(text)[0] for text in "71l")
    p = np.zeros((4, vocab))
    p[0, one] = p[0, small_l] = 0.5
    p[1, seven] = 1
    p[2] = 1 / vocab
    p[3, loaded.tokenizer.space_id] = 1
    boxes = np.array([[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]], float)
    return lens.Lens(Image.new("RGB", (16, 16), "white"), boxes, p)


def test_entropy_is_in_bits(drawn, loaded):
    np.testing.assert_allclose(drawn.entropies(), [1, 0, np.log2(loaded.tokenizer.vocab_size), 0], atol=1e-12)


def test_readings_run_from_certain_to_ignorant_and_skip_spaces(drawn, loaded):
    found = lens.readings(drawn, loaded.tokenizer, count=6)
    assert [round(reading.entropy, 3) for reading in found] == [0, 1, round(np.log2(loaded.tokenizer.vocab_size), 3)]
    assert found[0].tokens[0] == ("7", 1.0)
    assert {found[1].tokens[0][0], found[1].tokens[1][0]} == {"1", "l"}
    assert [reading.image.size for reading in found] == [(8, 8)] * 3
    assert [reading.entropy for reading in lens.readings(drawn, loaded.tokenizer, count=2)] == [
        found[0].entropy,
        found[2].entropy,
    ]


def test_the_picture_tints_by_entropy(drawn, loaded):
    picture = Image.open(io.BytesIO(lens.picture(drawn, loaded.tokenizer))).convert("RGB")
    assert picture.width == pytest.approx(lens.PICTURE_INCHES * lens.DPI, abs=2)

    def color(x: float, y: float) -> np.ndarray:
        return np.array(picture.getpixel((int(x * picture.width), int(y * picture.width))), int)

    certain, ignorant, blank = color(0.7, 0.1), color(0.3, 0.6), color(0.7, 0.6)
    np.testing.assert_array_equal(certain, blank)
    assert np.abs(certain - ignorant).max() > 40
