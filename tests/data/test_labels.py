import numpy as np
import pytest
from PIL import Image

from alignvlm_jax import presets
from alignvlm_jax.data import images, labels
from alignvlm_jax.data.record import Word

VISION = presets.VISION["tiny"]
SUPERSAMPLING = 4


def reference(lines, tiles, tokenizer, vision, k, blank_weight):
    """Labels by counting sub-pixels, a quarter of a pixel wide, patch by patch."""
    rows, columns = vision.patch_grid
    s = SUPERSAMPLING
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
                loss_weights[n, patch] = blank_weight
                continue
            blank = line_heights[patch // columns] * vision.patch_width - column.sum()
            column[tokenizer.space_id] = max(blank, 0)
            top = sorted(
                np.flatnonzero(column),
                key=lambda token: (-column[token], token == tokenizer.space_id, token),
            )[:k]
            ids[n, patch, : len(top)] = top
            weights[n, patch, : len(top)] = column[top] / column[top].sum()
            loss_weights[n, patch] = 1
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
        args = lines, tiles, tokenizer, VISION, k, 0.2
        ids, weights, loss_weights = labels.patch_labels(*args)
        expected_ids, expected_weights, expected_loss_weights = reference(*args)
        np.testing.assert_allclose(weights, expected_weights, atol=1e-5)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(loss_weights, expected_loss_weights)
        assert (loss_weights == 1).any() and (loss_weights < 1).any()


def test_shapes_types_and_sums(tokenizer):
    tiles = images.tile_image(Image.new("RGB", (128, 64)), VISION, 2, use_overview=False)
    lines = random_lines(np.random.default_rng(1), 128, 64)
    ids, weights, loss_weights = labels.patch_labels(lines, tiles, tokenizer, VISION, 3, 0.2)
    assert (ids.shape, weights.shape, loss_weights.shape) == ((2, 32, 3), (2, 32, 3), (2, 32))
    assert (ids.dtype, weights.dtype, loss_weights.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (np.diff(weights) <= 1e-6).all()


def test_a_token_twice_in_a_patch_is_one_label(tokenizer):
    tiles = images.tile_image(Image.new("RGB", (128, 32)), VISION, 1, use_overview=False)
    word = Word("aba", (0.0, 0.0, 8.0, 16.0), (0.0, 3.0, 6.0, 8.0))
    ids, weights, _ = labels.patch_labels([[word]], tiles, tokenizer, VISION, 3, 0.2)
    a, b = tokenizer.encode("ab")
    assert ids[0, 0].tolist() == [a, b, tokenizer.space_id]
    np.testing.assert_allclose(weights[0, 0], [5 / 8, 3 / 8, 0])


def test_a_page_without_words_is_blank(tokenizer):
    tiles = images.tile_image(Image.new("RGB", (128, 64)), VISION, 2, use_overview=False)
    ids, weights, loss_weights = labels.patch_labels([], tiles, tokenizer, VISION, 3, 0.2)
    assert (ids == tokenizer.space_id).all()
    np.testing.assert_array_equal(weights, np.broadcast_to([1, 0, 0], weights.shape))
    np.testing.assert_allclose(loss_weights, 0.2)


def test_a_word_from_right_to_left_begins_at_its_right(tokenizer):
    """Its characters were laid out from the left: the last letter was labelled with the first."""
    word = Word("אבג 12", (0.0, 0.0, 60.0, 10.0))
    ids, boxes = labels.token_boxes([[word]], tokenizer)
    spans = {
        start: box
        for (_, start, _), box in zip(tokenizer.token_offsets(word.text), boxes, strict=True)
    }
    assert len(ids) == len(boxes) and spans[0][2] == 60
    lefts = [spans[start][0] for start in sorted(spans)]
    assert lefts == sorted(lefts, reverse=True) and (boxes[:, 0] <= boxes[:, 2]).all()
    assert labels.token_boxes([[Word("abc", word.box)]], tokenizer)[1][0, 0] == 0
