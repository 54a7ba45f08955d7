"""Pages as tiles by their text lines: for labels, training examples and prompts."""

import dataclasses
import os

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import images, labels, tiling
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.errors import UserError

FONT = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf")
TEXTS = (
    "the first line of a page that is so long that it takes more than one tile of it",
    "a sea area",
    "and jumps, (quickly)",
)


@pytest.fixture
def lines_config(demo_config):
    """The demo's stage by text lines, with tiles of 16 x 128."""
    model = demo_config.model
    vision = dataclasses.replace(model.vision, tile_height=16, patch_height=16, patch_width=8)
    data = dataclasses.replace(
        demo_config.data, tiling="lines", max_tiles=12, seq_len=640, min_token_height=4
    )
    model = dataclasses.replace(model, vision=vision)
    return config_lib.check(dataclasses.replace(demo_config, model=model, data=data))


def page(texts=TEXTS, size=18) -> tuple[Image.Image, tuple[tuple[Word, ...], ...]]:
    """A page of lines, and their words with the boxes of a PDF: all of the font's height."""
    font = ImageFont.truetype(FONT, size)
    image = Image.new("RGB", (1000, 40 + 30 * len(texts)), "white")
    pen = ImageDraw.Draw(image)
    lines = []
    for number, text in enumerate(texts):
        x = 20 + 10 * number
        baseline = 40 + 30 * number
        pen.text((x, baseline), text, "black", font, anchor="ls")
        words = []
        for start, word in starts(text):
            edges = [x + font.getlength(text[: start + i]) for i in range(len(word) + 1)]
            box = (edges[0], baseline - 0.8 * size, edges[-1], baseline + 0.2 * size)
            words.append(Word(word, box, tuple(edges)))
        lines.append(tuple(words))
    return image, tuple(lines)


def starts(text: str) -> list[tuple[int, str]]:
    found = []
    start = 0
    for word in text.split(" "):
        found.append((start, word))
        start += len(word) + 1
    return found


def record(num_images=1, texts=TEXTS) -> Record:
    image, lines = page(texts)
    turns = (Turn("What is it?", ("a page",)),)
    return Record(
        "r", "test", (images.encode_png(image),) * num_images, turns, (lines,) * num_images
    )


def test_lines_are_cut_into_pieces_from_the_left(lines_config):
    image, _ = page()
    vision = lines_config.model.vision
    tiles = tiling.tile_page(image, vision, lines_config.data)
    assert tiles.pixels.shape == (len(tiles.crops), 16, 128, 3)
    tops = tiles.crops[:, 1]
    assert (np.diff(tops) >= 0).all() and len(set(tops)) == 3
    heights = tiles.crops[:, 3] - tops
    # Each line is as high as the tile, and its pieces stand side by side.
    np.testing.assert_allclose(heights * tiles.scales[:, 1], 16)
    np.testing.assert_allclose(tiles.scales[:, 0], tiles.scales[:, 1], rtol=0.05)
    for top in set(tops):
        pieces = tiles.crops[tops == top]
        assert (pieces[1:, 0] == pieces[:-1, 2]).all()
        assert len(set((pieces[:-1, 2] - pieces[:-1, 0]).tolist())) <= 1
    assert (tops == tops[0]).sum() == 5 and len(tiles.crops) == 8
    # What a tile shows is that part of the page.
    for pixels, crop, scale in zip(tiles.pixels, tiles.crops, tiles.scales, strict=True):
        width = round((crop[2] - crop[0]) * scale[0])
        cell = image.crop(tuple(crop)).resize((width, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pixels[:, :width], np.asarray(cell))
        assert (pixels[:, width:] == 255).all()


@pytest.mark.parametrize("unit", ["token", "character"])
def test_every_word_is_labelled_in_the_patch_where_it_is_drawn(lines_config, tokenizer, unit):
    image, lines = page()
    vision = lines_config.model.vision
    data = dataclasses.replace(lines_config.data, label_unit=unit)
    tiles = tiling.tile_page(image, vision, data)
    found = labels.patch_labels(lines, tiles, tokenizer, vision, data)
    for line in lines:
        for word in line:
            x = (word.box[0] + word.box[2]) / 2
            y = (word.box[1] + word.box[3]) / 2
            left, top, right, bottom = tiles.crops.T
            [tile] = np.flatnonzero((left <= x) & (x < right) & (top <= y) & (y < bottom))
            patch = int((x - left[tile]) * tiles.scales[tile, 0] / vision.patch_width)
            ids = found.ids[tile, patch][found.weights[tile, patch] > 0].tolist()
            tokens = {token for token, _, _ in tokenizer.token_offsets(word.text)}
            if unit == "character":
                tokens = {t for c in word.text for t, _, _ in tokenizer.token_offsets(c)}
            assert tokens & set(ids), word
            assert found.loss_weights[tile, patch] > data.blank_weight
    # All of the ink is labelled: of a blank patch nothing is drawn, but where tails are.
    dark = (tiles.pixels.min(-1) < 100).reshape(len(tiles.pixels), 16, -1, 8).sum((1, 3))
    is_blank = (found.ids == tokenizer.space_id).all(-1)
    assert dark[is_blank].max() <= 4


def test_a_page_without_lines_is_one_blank_tile(lines_config):
    blank = Image.new("RGB", (850, 1100), "white")
    tiles = tiling.tile_page(blank, lines_config.model.vision, lines_config.data)
    assert tiles.pixels.shape == (1, 16, 128, 3) and (tiles.pixels == 255).all()
    np.testing.assert_array_equal(tiles.crops, [[0, 0, 850, 1100]])


def test_a_grid_is_cut_as_before(demo_config):
    image, _ = page()
    vision = demo_config.model.vision
    found = tiling.tile_page(image, vision, demo_config.data)
    expected = images.tile_image(image, vision, demo_config.data.max_tiles, False)
    np.testing.assert_array_equal(found.pixels, expected.pixels)


def test_more_lines_than_tiles_are_refused(lines_config, tokenizer):
    vision = lines_config.model.vision
    short = dataclasses.replace(lines_config.data, max_tiles=7)
    message = r"the page has 3 lines in 8 tiles of 16 x 128 pixels; config\.data\.max_tiles is 7"
    with pytest.raises(UserError, match=f"^{message}$"):
        tiling.tile_page(page()[0], vision, short)
    message = r"^image 0 of record r has 3 lines in 8 tiles .*; config\.data\.record_tiles is 6$"
    short = dataclasses.replace(lines_config.data, record_tiles=6)
    builder = ExampleBuilder.of(dataclasses.replace(lines_config, data=short), tokenizer)
    with pytest.raises(UserError, match=message):
        builder.tile_pages(record())
    # The second page has what the first has left.
    builder = ExampleBuilder.of(lines_config, tokenizer)
    with pytest.raises(UserError, match=r"^image 1 of .* is 12, which leaves 4 for it$"):
        builder.tile_pages(record(2))
    assert len(builder.tile_pages(record(2, TEXTS[1:]))) == 2


def test_an_example_and_a_prompt_have_the_tiles_of_the_lines(lines_config, tokenizer):
    builder = ExampleBuilder.of(lines_config, tokenizer)
    one = record()
    tiles = tiling.tile_page(page()[0], lines_config.model.vision, lines_config.data).pixels
    count = len(tiles) * lines_config.model.tokens_per_tile
    sequence = builder.sequence(one, "transcribe", np.random.default_rng(0))
    prompts = [builder.prompt(one, "Who?"), builder.prompt(page()[0], "Who?")]
    for arrays in (sequence, *prompts):
        assert (arrays["tokens"] == lines_config.model.image_token_id).sum() == count
        np.testing.assert_array_equal(arrays["tiles"][: len(tiles)], tiles)
        assert not arrays["tiles"][len(tiles) :].any() and len(arrays["tiles"]) == 12
    assert sequence["loss_weights"].any() and sequence["patch_loss_weights"][: len(tiles)].any()
    np.testing.assert_array_equal(prompts[0]["tokens"], prompts[1]["tokens"])


def test_the_size_at_which_a_page_is_seen_is_that_of_its_lines(lines_config):
    image, _ = page(size=36)
    vision = lines_config.model.vision
    data = dataclasses.replace(lines_config.data, max_tiles=40)
    height, width = tiling.seen_size(image, vision, data)
    # Lines of about 45 pixels become 16 high.
    assert 0.25 < height / image.height < 0.5 and 0.25 < width / image.width < 0.5
    grid = DataConfig(max_tiles=2)
    expected = images.seen_size(image.height, image.width, vision, 2, False)
    assert tiling.seen_size(image, vision, grid) == expected
