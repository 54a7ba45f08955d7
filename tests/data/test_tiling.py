"""Pages as tiles by their text lines: for labels, training examples and prompts."""

import dataclasses
import itertools
import os

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import images, labels, text_lines, tiling
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import assistant

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


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_the_tiles_of_each_line(lines_config, most):
    image, _ = page(TEXTS * 2)
    vision = lines_config.model.vision
    tiles = tiling.tile_page(image, vision, lines_config.data, tiling.ANY_NUMBER)
    found = tiling.by_lines(tiles, most)
    for name in ("pixels", "crops", "scales"):
        joined = np.concatenate([getattr(one, name) for one in found])
        np.testing.assert_array_equal(joined, getattr(tiles, name))
    expected = []
    for line in text_lines.find(image)[:, [1, 3]]:
        count = int((tiles.crops[:, [1, 3]] == line).all(1).sum())
        expected += [min(most, count - start) for start in range(0, count, most)]
    assert [len(one.crops) for one in found] == expected and max(expected) <= most


def test_lines_are_cut_into_pieces_from_the_left(lines_config):
    image, lines = page()
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
        # As wide as the tile at most, and where another follows nearly.
        fractions = (pieces[:, 2] - pieces[:, 0]) * tiles.scales[tops == top, 0] / 128
        assert (fractions <= 1).all() and (fractions[:-1] >= tiling.SHORTEST - 0.01).all()
    assert (tops == tops[0]).sum() == 6 and len(tiles.crops) == 9
    # No word is cut that fits into the end of a tile in which a gap is looked for, and no letter.
    room = (1 - tiling.SHORTEST) * 128 / tiles.scales[0, 0]
    for word in (word for line in lines for word in line):
        parts = [word.edges] if word.box[2] - word.box[0] < room else itertools.pairwise(word.edges)
        for part in parts:
            left, top, right, bottom = tiles.crops.T
            y = (word.box[1] + word.box[3]) / 2
            # Ink is narrower than a box, by up to half a letter.
            is_in = (left - 5 <= part[0]) & (part[-1] <= right + 5) & (top <= y) & (y < bottom)
            assert is_in.sum() == 1, word
    # What a tile shows is that part of the page.
    for pixels, crop, scale in zip(tiles.pixels, tiles.crops, tiles.scales, strict=True):
        width = round((crop[2] - crop[0]) * scale[0])
        cell = image.crop(tuple(crop)).resize((width, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pixels[:, :width], np.asarray(cell))
        assert (pixels[:, width:] == 255).all()


def test_a_word_wider_than_a_tile_is_cut_between_letters_or_at_the_width(lines_config):
    vision = lines_config.model.vision
    image, [[word]] = page(["m" * 60])
    crops = tiling.tile_page(image, vision, lines_config.data).crops
    # Of a monospaced font, whose letters stand evenly.
    pitch = word.edges[1] - word.edges[0]
    places = (crops[:-1, 2] - word.edges[0]) / pitch
    np.testing.assert_allclose(places, places.round(), atol=1.5 / pitch)
    # A figure has no gaps at all.
    bar = Image.new("RGB", (1000, 200), "white")
    noise = np.random.default_rng(0).integers(0, 120, (20, 900)).astype(np.uint8)
    bar.paste(Image.fromarray(noise), (50, 90))
    crops = tiling.tile_page(bar, vision, lines_config.data).crops
    widths = crops[:, 2] - crops[:, 0]
    assert len(crops) > 3 and len(set(widths[:-1].tolist())) == 1 and widths[-1] <= widths[0]
    # One gap near the end of a tile, which is not in the middle of what is looked at.
    width = int(widths[0])
    noise[:, width - 5 : width - 2] = 255
    bar.paste(Image.fromarray(noise), (50, 90))
    crops = tiling.tile_page(bar, vision, lines_config.data).crops
    assert 50 + width - 5 < crops[0, 2] < 50 + width - 2


@pytest.mark.parametrize("is_inverted", [False, True])
def test_a_line_along_a_rule_is_cut_where_it_is_without(lines_config, is_inverted):
    """As the running head of a book is; a rule all along leaves no column blank."""
    text = "a running head of many a page, with a rule just below the baseline"
    image, _ = page([text])
    vision = lines_config.model.vision
    [line] = text_lines.find(image).tolist()
    plain = np.asarray(image.convert("L"))
    ruled = plain.copy()
    # Not black: where a descender crosses it is darker.
    bottom = line[3] - 1
    ruled[bottom - 2 : bottom] = np.minimum(ruled[bottom - 2 : bottom], 90)
    if is_inverted:
        plain, ruled = 255 - plain, 255 - ruled
    expected, found = (
        list(tiling._pieces(line, Image.fromarray(levels), vision)) for levels in (plain, ruled)
    )
    assert len(expected) > 3 and found == expected


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
    message = r"the page has 3 lines in 9 tiles of 16 x 128 pixels; config\.data\.max_tiles is 7"
    with pytest.raises(UserError, match=f"^{message}$"):
        tiling.tile_page(page()[0], vision, short)
    message = r"^image 0 of record r has 3 lines in 9 tiles .*; config\.data\.record_tiles is 6$"
    short = dataclasses.replace(lines_config.data, record_tiles=6)
    builder = ExampleBuilder.of(dataclasses.replace(lines_config, data=short), tokenizer)
    with pytest.raises(UserError, match=message):
        builder.tile_pages(record())
    # The second page has what the first has left.
    builder = ExampleBuilder.of(lines_config, tokenizer)
    with pytest.raises(UserError, match=r"^image 1 of .* is 12, which leaves 3 for it$"):
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


def test_a_page_is_read_line_by_line(lines_config, tokenizer):
    """Also one of more lines than a question may be about."""
    image, _ = page(TEXTS * 4)
    builder = ExampleBuilder.of(lines_config, tokenizer)
    with pytest.raises(UserError, match=r"^the page has 12 lines in \d+ tiles of .* is 12$"):
        builder.prompt(image, "Who?")
    prompts = assistant.reading_prompts(builder, image)
    assert len(prompts) == 12
    shown = [prompt["tiles"][: builder.num_tiles(prompt)] for prompt in prompts]
    whole = tiling.tile_page(image, builder.vision, builder.data, tiling.ANY_NUMBER)
    np.testing.assert_array_equal(np.concatenate(shown), whole.pixels)
    for prompt in prompts:
        text = prompt["tokens"][prompt["tokens"] != builder.image_token_id]
        assert tokenizer.decode(text.tolist()) == TRANSCRIBE_QUESTION
    # A page without any is one tile, asked about as ever.
    blank = Image.new("RGB", (60, 30), "white")
    [only] = assistant.reading_prompts(builder, blank)
    expected = builder.prompt(blank, TRANSCRIBE_QUESTION)
    assert all((only[name] == expected[name]).all() for name in expected)


def test_of_a_run_of_blank_patches_one_stays(lines_config):
    """Flat ones of any colour are blank; runs end with their row of a tile."""
    vision = dataclasses.replace(lines_config.model.vision, tile_height=32, tile_width=40)
    data = dataclasses.replace(lines_config.data, blank_contrast=16)
    pixels = np.full((2, 32, 40, 3), 255, np.uint8)
    pixels[0, :16, 8:16] = 90
    pixels[0, 3, 9] = 60, 90, 110
    pixels[1] = 40
    pixels[1, 20, 39] = 40, 40, 56
    kept = tiling.kept_patches(pixels, vision, data).reshape(2, 2, 5).astype(int)
    np.testing.assert_array_equal(kept[0], [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(kept[1], [[1, 0, 0, 0, 0], [1, 0, 0, 0, 1]])
    assert tiling.kept_patches(pixels, vision, lines_config.data).all()


def test_blank_patches_are_left_out_of_examples_and_prompts_alike(lines_config, tokenizer):
    data = dataclasses.replace(lines_config.data, blank_contrast=16, seq_len=500)
    config = config_lib.check(dataclasses.replace(lines_config, data=data))
    builder = ExampleBuilder.of(config, tokenizer)
    one = record()
    tiles = tiling.tile_page(page()[0], config.model.vision, data).pixels
    kept = tiling.kept_patches(tiles, config.model.vision, data)
    assert 0.2 < kept.mean() < 0.9
    sequence = builder.sequence(one, "transcribe", np.random.default_rng(0))
    prompts = [builder.prompt(one, "Who?"), builder.prompt(page()[0], "Who?")]
    for arrays in (sequence, *prompts):
        assert (arrays["tokens"] == config.model.image_token_id).sum() == kept.sum()
        np.testing.assert_array_equal(arrays["kept_patches"][: len(tiles)], kept)
        assert not arrays["kept_patches"][len(tiles) :].any()
    # No patch with text is left out, and labels are where they were.
    labelled = sequence["patch_loss_weights"] > data.blank_weight
    assert labelled.any() and sequence["kept_patches"][labelled].all()
    assert builder.extent(prompts, multiple=1)[1] == len(tiles)
    [trimmed, _] = builder.trim_prompts(prompts)
    assert len(trimmed["kept_patches"]) == len(trimmed["tiles"]) == len(tiles)
    everything = ExampleBuilder.of(lines_config, tokenizer).prompt(one, "Who?")
    assert "kept_patches" not in everything


def test_a_page_that_does_not_fit_is_told_with_its_tokens(lines_config, tokenizer):
    """Full tiles may be more than a sequence: what does not fit is known when a page is seen."""
    data = dataclasses.replace(lines_config.data, blank_contrast=16, seq_len=40)
    config = config_lib.check(dataclasses.replace(lines_config, data=data))
    builder = ExampleBuilder.of(config, tokenizer)
    sequence = builder.sequence(record(), "answer", np.random.default_rng(0))
    assert not sequence["loss_weights"].any() and len(sequence["tokens"]) == 40
    assert (sequence["patch_loss_weights"] > 0).any()
    message = (
        r"^the prompt about record r has \d+ .* is 40; no question is short .* part of the page$"
    )
    with pytest.raises(UserError, match=message):
        builder.prompt(record(), "Who?")
    with pytest.raises(UserError, match=r"^the prompt has \d+ tokens .* part of the page$"):
        builder.prompt(page()[0], "Who?")
    wide = dataclasses.replace(builder, data=dataclasses.replace(data, seq_len=400))
    with pytest.raises(UserError, match=r"is 400; shorten the question by \d+ tokens$"):
        wide.prompt(record(), "Who?" * 200)


def test_how_high_words_are_in_the_tiles_that_show_them(lines_config):
    image, lines = page()
    blank = (Word(" ", (0.0, 0.0, 9.0, 900.0)),)
    vision = lines_config.model.vision
    data = dataclasses.replace(lines_config.data, max_tiles=40)
    for most, overview in ((1, False), (6, False), (6, True)):
        grid = DataConfig(max_tiles=most, use_overview=overview)
        tiles = tiling.tile_page(image, vision, grid)
        heights = tiling.word_heights([tiles], [(*lines, blank)])
        assert len(heights) == sum(map(len, lines))
        scales = tiles.scales[:, 1]
        assert {round(height, 3) for height in heights} <= {
            round(18 * x, 3) for x in scales.tolist()
        }
        assert max(heights) == pytest.approx(18 * scales.max())
    cut = tiling.tile_page(image, vision, data)
    heights = tiling.word_heights([cut], [lines])
    assert len(heights) == sum(map(len, lines)) and 10 < np.median(heights) < 20


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
