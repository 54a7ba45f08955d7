import dataclasses

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax import presets
from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import images, labels
from alignvlm_jax.data.record import Word

VISION = presets.VISION["tiny"]
SUPERSAMPLING = 4
EVERY = DataConfig(min_token_height=0, min_contrast=0)
"""Labels all patches that a box covers."""


def reference(lines, tiles, tokenizer, vision, data):
    """Labels by counting sub-pixels, a quarter of a pixel wide, patch by patch."""
    rows, columns = vision.patch_grid
    s = SUPERSAMPLING
    k = data.max_patch_labels
    ids = np.full((len(tiles.pixels), rows * columns, k), tokenizer.space_id)
    weights = np.zeros(ids.shape)
    loss_weights = np.zeros(ids.shape[:2])
    for n, (crop, scale) in enumerate(zip(tiles.crops, tiles.scales, strict=True)):
        y, x = np.mgrid[: vision.tile_height * s, : vision.tile_width * s] + 0.5
        page_x = x / s / scale[0] + crop[0]
        page_y = y / s / scale[1] + crop[1]
        on_page = (page_x < crop[2]) & (page_y < crop[3])
        counts = np.zeros((tokenizer.vocab_size, rows, columns))
        line_heights = np.zeros(rows)
        for word in (word for line in lines for word in line):
            edges = word.edges or np.linspace(word.box[0], word.box[2], len(word.text) + 1)
            for token, start, end in tokenizer.token_offsets(word.text):
                inside = (page_x >= edges[start]) & (page_x < edges[end]) & on_page
                inside &= (page_y >= word.box[1]) & (page_y < word.box[3])
                shape = rows, vision.patch_height * s, columns, vision.patch_width * s
                counts[token] += inside.reshape(shape).sum((1, 3))
                heights = inside.any(1).reshape(rows, -1).sum(1) / s
                line_heights = np.maximum(line_heights, heights)
        areas = counts.reshape(tokenizer.vocab_size, -1) / s**2
        for patch in range(rows * columns):
            column = areas[:, patch]
            if column.sum() < vision.patch_height * vision.patch_width / 8:
                weights[n, patch, 0] = 1
                loss_weights[n, patch] = data.blank_weight
                continue
            text = column.sum()
            blank = line_heights[patch // columns] * vision.patch_width - column.sum()
            column[tokenizer.space_id] = max(blank, 0)
            top = sorted(
                np.flatnonzero(column),
                key=lambda token: (-column[token], token == tokenizer.space_id, token),
            )[:k]
            ids[n, patch, : len(top)] = top
            weights[n, patch, : len(top)] = column[top] / column[top].sum()
            area = vision.patch_height * vision.patch_width
            loss_weights[n, patch] = min(text / area / data.full_cover, 1)
    return ids, weights, loss_weights


def random_lines(rng, width, height, with_edges=True, fraction=0.25):
    """Words anywhere, off the page and on top of each other too; their edges lie on a grid of
    `fraction` pixels."""
    lines = []
    for _ in range(6):
        text = "".join("abcABC12"[i] for i in rng.integers(0, 8, rng.integers(1, 9)))
        edges = np.cumsum(
            [rng.integers(-5, width), *rng.integers(2, 11, len(text))]
        ) + fraction * rng.integers(0, 4)
        top = rng.integers(-5, height)
        size = rng.integers(4, 18)
        if not with_edges:
            edges = np.linspace(edges[0], edges[0] + 8 * len(text), len(text) + 1)
        box = (float(edges[0]), float(top), float(edges[-1]), float(top + size))
        lines.append((Word(text, box, tuple(map(float, edges)) if with_edges else None),))
    return lines


@pytest.mark.parametrize("size", [(128, 64), (128, 32), (256, 128), (64, 64), (64, 16)])
@pytest.mark.parametrize("with_edges", [True, False])
def test_labels_equal_the_dense_reference(tokenizer, size, with_edges):
    rng = np.random.default_rng(0)
    tiles = images.tile_image(Image.new("RGB", size), VISION, 3, use_overview=size == (256, 128))
    for k in (1, 3, 8):
        # The larger page shrinks to a half and a quarter: whole pixels are then what sub-pixels can
        # count.
        lines = random_lines(rng, *size, with_edges, fraction=1 if size == (256, 128) else 0.25)
        cover = {1: 1.0, 3: 0.5, 8: 1 / 8}[k]
        data = dataclasses.replace(EVERY, max_patch_labels=k, full_cover=cover)
        args = lines, tiles, tokenizer, VISION, data
        ids, weights, loss_weights = labels.patch_labels(*args)
        expected_ids, expected_weights, expected_loss_weights = reference(*args)
        np.testing.assert_allclose(weights, expected_weights, atol=1e-5)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(loss_weights, expected_loss_weights, atol=1e-5)
        assert (loss_weights > 0.2).any() and (loss_weights == np.float32(0.2)).any()


def test_shapes_types_and_sums(tokenizer):
    tiles = images.tile_image(Image.new("RGB", (128, 64)), VISION, 2, use_overview=False)
    lines = random_lines(np.random.default_rng(1), 128, 64)
    ids, weights, loss_weights = labels.patch_labels(lines, tiles, tokenizer, VISION, EVERY)
    assert (ids.shape, weights.shape, loss_weights.shape) == ((2, 32, 3), (2, 32, 3), (2, 32))
    assert (ids.dtype, weights.dtype, loss_weights.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (np.diff(weights) <= 1e-6).all()


def test_a_token_twice_in_a_patch_is_one_label(tokenizer):
    tiles = images.tile_image(Image.new("RGB", (128, 32)), VISION, 1, use_overview=False)
    word = Word("aba", (0.0, 0.0, 8.0, 16.0), (0.0, 3.0, 6.0, 8.0))
    ids, weights, _ = labels.patch_labels([[word]], tiles, tokenizer, VISION, EVERY)
    a, b = tokenizer.encode("ab")
    assert ids[0, 0].tolist() == [a, b, tokenizer.space_id]
    np.testing.assert_allclose(weights[0, 0], [5 / 8, 3 / 8, 0])


def test_a_slope_tells_the_order_of_characters_in_a_patch(tokenizer):
    """By area alone "ab" and "ba" are the same labels; a space, too, counts by where it is."""
    tiles = images.tile_image(Image.new("RGB", (128, 32)), VISION, 1, use_overview=False)
    a, b = tokenizer.encode("ab")

    def weights(text: str, slope: float) -> dict[int, float]:
        word = Word(text, (0.0, 0.0, 4.0 * len(text), 16.0))
        data = dataclasses.replace(EVERY, label_slope=slope)
        found = labels.patch_labels([[word]], tiles, tokenizer, VISION, data)
        assert found.weights.sum(-1) == pytest.approx(1)
        return {
            token: found.weights[0, 0][found.ids[0, 0] == token].sum()
            for token in found.ids[0, 0].tolist()
        }

    assert weights("ab", 0.0) == weights("ba", 0.0)
    assert weights("ab", 1.0)[a] == weights("ba", 1.0)[b] == pytest.approx(0.75)
    assert weights("ab", 0.5)[b] == pytest.approx(0.375)
    assert weights("a", 1.0) == pytest.approx({a: 0.75, tokenizer.space_id: 0.25})


def test_labels_are_of_characters_where_the_unit_says_so():
    """Whatever tokens the word has; a character of several tokens shares its place among them."""

    class Words:
        """A tokenizer whose every word is a token, and every é two."""

        space_id = 0

        def token_offsets(self, text):
            count = 2 if text == "é" else 1
            return [(ord(text[0]) + number, 0, len(text)) for number in range(count)]

    tiles = images.tile_image(Image.new("RGB", (128, 32)), VISION, 1, use_overview=False)
    word = Word("aé", (0.0, 0.0, 16.0, 16.0))
    of = {
        unit: labels.patch_labels(
            [[word]], tiles, Words(), VISION, dataclasses.replace(EVERY, label_unit=unit)
        )
        for unit in ("token", "character")
    }
    np.testing.assert_array_equal(of["token"].ids[0, :2, 0], [ord("a")] * 2)
    np.testing.assert_array_equal(of["character"].ids[0, 0], [ord("a"), 0, 0])
    np.testing.assert_array_equal(of["character"].ids[0, 1], [ord("é"), ord("é") + 1, 0])
    np.testing.assert_allclose(of["character"].weights[0, :2], [[1, 0, 0], [0.5, 0.5, 0]])


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_letters_read_in_order_are_the_text(scale):
    """Each stands once, in the patch of its middle, the left one of two with more weight; wide
    letters leave patches without any, and words begin with the space before them."""

    class Characters:
        """A tokenizer with a token of each character, and of each letter with a space before it; a
        digit with one is two."""

        space_id = ord(" ")

        def token_offsets(self, text):
            if len(text) == 2 and text[0] == " " and text[1].isalpha():
                return [(1000 + ord(text[1]), 0, 2)]
            return [(ord(character), i, i + 1) for i, character in enumerate(text)]

    rng = np.random.default_rng(0)
    words = []
    x = 1.0
    for text in ("ilk", "Wigly", "7th", "oil"):
        # From a third of a patch, of which two may have their middles in one, to two patches.
        edges = x + np.cumsum([0, *rng.choice([2.7, 4.2, 8.0, 13.0], len(text))])
        words.append(Word(text, (x, 0.0, float(edges[-1]), 16.0), tuple(edges.tolist())))
        x = float(edges[-1]) + 5
    assert 90 < x < 128 / scale
    tiles = images.tile_image(ink(128, 32), VISION, 1, use_overview=False)
    tiles = dataclasses.replace(
        tiles, crops=tiles.crops / scale, scales=np.full_like(tiles.scales, scale)
    )
    data = dataclasses.replace(EVERY, label_unit="letter", label_slope=0.6)
    found = labels.patch_labels([words], tiles, Characters(), VISION, data)
    num_columns = VISION.patch_grid[1]
    read = []
    for ids, weights in zip(
        found.ids[0, :num_columns], found.weights[0, :num_columns], strict=True
    ):
        assert weights.sum() == pytest.approx(1) and (np.diff(weights) <= 0).all()
        read += [
            (" " * (token > 1000)) + chr(token % 1000 if token > 1000 else token)
            for token, weight in zip(ids.tolist(), weights, strict=True)
            if weight and token != Characters.space_id
        ]
    assert "".join(read) == " ilk Wigly7th oil"
    # What is between two middles says nothing, and is taught so.
    is_text = found.loss_weights[0, :num_columns] > data.blank_weight
    is_silent = (found.ids[0, :num_columns, 0] == Characters.space_id) & is_text
    assert is_silent.any()


def test_a_letter_beside_a_cut_is_of_the_tile_that_shows_its_middle(tokenizer):
    """Also where the patch at the end of a tile that its crop does not fill has room for it."""
    tiles = images.stack(images.fit(ink(128, 32), (0, 0, 128, 32), VISION) for _ in range(2))
    # Boxes of letters reach a little over the gap between their ink.
    tiles = dataclasses.replace(
        tiles, crops=np.array([[0, 0, 66, 32], [66, 0, 128, 32]], np.float32)
    )
    word = Word("abc", (57.5, 0.0, 77.5, 16.0), (57.5, 65.5, 69.5, 77.5))
    data = dataclasses.replace(EVERY, label_unit="letter", label_slope=0.6)
    found = labels.patch_labels([[word]], tiles, tokenizer, VISION, data)
    for letter, tile in zip("abc", (0, 1, 1), strict=True):
        spelled = {token for token, _, _ in tokenizer.token_offsets(letter)}
        shown = np.isin(found.ids, list(spelled)) & (found.weights > 0)
        assert np.flatnonzero(shown.any((1, 2))).tolist() == [tile], letter


def test_a_page_without_words_is_blank(tokenizer):
    tiles = images.tile_image(Image.new("RGB", (128, 64)), VISION, 2, use_overview=False)
    ids, weights, loss_weights = labels.patch_labels([], tiles, tokenizer, VISION, EVERY)
    assert (ids == tokenizer.space_id).all()
    np.testing.assert_array_equal(weights, np.broadcast_to([1, 0, 0], weights.shape))
    np.testing.assert_allclose(loss_weights, 0.2)


def test_a_word_from_right_to_left_begins_at_its_right(tokenizer):
    """Its characters were laid out from the left: the last letter was labelled with the first."""
    word = Word("אבג 12", (0.0, 0.0, 60.0, 10.0))
    ids, boxes, _ = labels.place_tokens([[word]], tokenizer)
    spans = {
        start: box
        for (_, start, _), box in zip(tokenizer.token_offsets(word.text), boxes, strict=True)
    }
    assert len(ids) == len(boxes) and spans[0][2] == 60
    lefts = [spans[start][0] for start in sorted(spans)]
    assert lefts == sorted(lefts, reverse=True) and (boxes[:, 0] <= boxes[:, 2]).all()
    assert labels.place_tokens([[Word("abc", word.box)]], tokenizer).boxes[0, 0] == 0


def test_a_column_of_characters_begins_at_its_top_and_turned_letters_carry_no_loss(tokenizer):
    """They were laid out from left to right, each as high as the word."""
    tiles = images.tile_image(ink(128, 64), VISION, 2, use_overview=False)
    stacked = labels.place_tokens([[Word("日12", (0.0, 0.0, 16.0, 48.0))]], tokenizer)
    tops = stacked.boxes[:, 1]
    assert (stacked.heights == 16).all() and (np.diff(tops) >= 0).all() and set(tops) == {0, 16, 32}
    assert (stacked.boxes[:, 0] == 0).all() and (stacked.boxes[:, 2] == 16).all()
    turned = [[Word("turned", (0.0, 0.0, 16.0, 64.0))]]
    loss_weights = labels.patch_labels(turned, tiles, tokenizer, VISION, DataConfig()).loss_weights
    (unknown,) = np.nonzero(loss_weights[0] == 0)
    assert set(unknown) == {0, 1, 16, 17}
    # Three of the narrowest letters side by side are no column.
    narrow = labels.place_tokens([[Word("ill", (0.0, 0.0, 7.0, 11.0))]], tokenizer)
    assert (narrow.heights == 11).all()


def ink(width: int, height: int) -> Image.Image:
    """A page that has ink in every patch."""
    return Image.fromarray((np.indices((height, width)).sum(0) % 2 * 255).astype(np.uint8)).convert(
        "RGB"
    )


def test_what_cannot_be_read_carries_no_loss(tokenizer):
    """On the overview of a large page its letters are 3 pixels high; those of the heading 8."""
    page = ink(512, 256)
    body = Word("body", (0.0, 0.0, 256.0, 12.0))
    heading = Word("head", (256.0, 0.0, 512.0, 32.0))
    tiles = images.tile_image(page, VISION, 33, use_overview=True)
    assert len(tiles.pixels) == 33
    found = labels.patch_labels([[body, heading]], tiles, tokenizer, VISION, DataConfig())
    top, bottom = found.loss_weights[0].reshape(2, 16)
    assert tiles.scales[0, 1] * 12 == 1.5 and tiles.scales[0, 1] * 32 == 4
    assert (found.loss_weights[0] <= np.float32(0.2)).all()
    # The heading covers a quarter of its patches, and the body less than an eighth of its own.
    np.testing.assert_allclose(top[4:8], 0)
    np.testing.assert_allclose([*top[:4], *top[8:], *bottom], 0.2)
    assert (found.ids[0] == tokenizer.space_id).all()
    # In the cells both are taught, by the fraction that they cover.
    np.testing.assert_allclose(found.loss_weights[1].reshape(2, 16)[0], 0.75)
    np.testing.assert_allclose(found.loss_weights[3].reshape(2, 16), 1)
    lower = DataConfig(min_token_height=4, min_contrast=0)
    seen = labels.patch_labels([[body, heading]], tiles, tokenizer, VISION, lower)
    np.testing.assert_allclose(seen.loss_weights[0].reshape(2, 16)[0, 4:8], 0.25)


def test_a_legible_token_is_taught_beside_one_that_is_not(tokenizer):
    """What the small print covers is not taught as a space."""
    tiles = images.tile_image(ink(128, 32), VISION, 1, use_overview=False)
    words = [Word("a", (0.0, 0.0, 4.0, 16.0)), Word("b", (4.0, 0.0, 8.0, 5.0))]
    found = labels.patch_labels([words], tiles, tokenizer, VISION, DataConfig())
    [a] = tokenizer.encode("a")
    assert found.ids[0, 0].tolist() == [a, tokenizer.space_id, tokenizer.space_id]
    # A line of 16 pixels: 64 of the patch's 128 are the letter's, 20 unread, 44 space.
    np.testing.assert_allclose(found.weights[0, 0], [64 / 108, 44 / 108, 0], rtol=1e-6)
    np.testing.assert_allclose(found.loss_weights[0, 0], 0.5)


@pytest.mark.parametrize("levels", [(255, 255), (250, 240), (0, 0)])
def test_no_patch_without_ink_is_taught_a_token(tokenizer, levels):
    pixels = np.full((32, 128), levels[0], np.uint8)
    pixels[::2] = levels[1]
    pixels[3, 11] = 128
    tiles = images.tile_image(Image.fromarray(pixels).convert("RGB"), VISION, 1, False)
    word = Word("abcd", (0.0, 0.0, 32.0, 16.0))
    found = labels.patch_labels([[word]], tiles, tokenizer, VISION, DataConfig()).loss_weights[0]
    assert found[:4].tolist() == [0, 1, 0, 0]
    every = labels.patch_labels([[word]], tiles, tokenizer, VISION, EVERY).loss_weights[0]
    assert every[:4].tolist() == [1, 1, 1, 1]


def test_ink_may_be_a_colour_of_the_same_brightness(tokenizer):
    pixels = np.full((32, 128, 3), (200, 100, 100), np.uint8)
    pixels[::2] = (100, 151, 100)
    tiles = images.tile_image(Image.fromarray(pixels), VISION, 1, use_overview=False)
    word = Word("a", (0.0, 0.0, 8.0, 16.0))
    found = labels.patch_labels([[word]], tiles, tokenizer, VISION, DataConfig())
    assert found.loss_weights[0, 0] == 1
