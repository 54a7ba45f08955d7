import numpy as np
import pytest

from alignvlm_jax.data import images, text_lines
from alignvlm_jax.synthetic import fonts, pages, snippets

CELLS = [
    ("Part", "Price", "Bought"),
    ("gasket", "18.40", "2021-03"),
    ("nylon", "7.15", "2019-11"),
    ("quay", "112.90", "1998-07"),
]


def drawn(make, count: int, unseen: bool = False):
    """Snippets in random styles."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        style = snippets.draw_style(rng, unseen)
        yield style, make(style, rng)


def ink_of(image) -> np.ndarray:
    """Where a snippet differs from its background, whichever of the two is lighter."""
    levels = np.asarray(image.convert("L")).astype(int)
    return np.abs(levels - np.bincount(levels.ravel()).argmax()) > 60


@pytest.mark.parametrize(
    "make",
    [
        lambda style, rng: snippets.text(["Copying the quilt", "jumps (by) 17"], style, rng),
        lambda style, rng: snippets.table(CELLS, style, rng),
    ],
    ids=["text", "table"],
)
def test_words_lie_on_their_ink_and_within_the_image(make):
    sizes = set()
    for style, (image, lines) in drawn(make, 60):
        sizes.add(style.size)
        ink = ink_of(image)
        for word in (word for line in lines for word in line):
            left, top, right, bottom = word.box
            assert left >= 0 and top >= 0 and right <= image.width and bottom <= image.height
            assert ink[int(top) : int(bottom) + 1, int(left) : int(right) + 1].any(), word
            assert len(word.edges) == len(word.text) + 1
            assert list(word.edges) == sorted(word.edges)
    assert min(sizes) >= 11 and max(sizes) <= 22 and len(sizes) > 8


def test_a_row_of_a_table_is_one_line(monkeypatch):
    """With rules of all kinds, which neither join lines nor are any; specks of a scan may be."""
    monkeypatch.setattr(snippets, "DEGRADED", 0.0)
    found = [
        len(text_lines.find(images.as_rgb(image)))
        for _, (image, _) in drawn(lambda *given: snippets.table(CELLS, *given), 100)
    ]
    assert found.count(len(CELLS)) >= 99


def test_backgrounds_are_white_grey_coloured_and_dark():
    made = [image for _, (image, _) in drawn(lambda *given: snippets.text(["Word"], *given), 100)]
    corners = [np.atleast_1d(np.asarray(image)[0, 0]).astype(int) for image in made]
    assert 50 < sum(corner.min() == 255 for corner in corners) < 90
    assert 3 < sum(corner.max() < 100 for corner in corners) < 25
    assert sum(np.ptp(corner) > 3 for corner in corners) > 5
    # Legible: ink and paper are far apart.
    assert min(np.ptp(np.asarray(image.convert("L")).astype(int)) for image in made) > 90


@pytest.mark.parametrize("unseen", [False, True])
def test_faces_are_of_one_side(unseen):
    side = {face for faces in (fonts.UNSEEN if unseen else fonts.SEEN).values() for face in faces}
    styles = [style for style, _ in drawn(lambda *_: None, 80, unseen)]
    assert {style.face for style in styles} <= side
    assert any(style.slant for style in styles) and any(style.stretch != 1 for style in styles)


def test_a_line_holds_what_fits():
    style = pages.Style(fonts.SEEN["Roboto"][0], 14)
    words = ["four"] * 20
    length = fonts.load(style.face, 14).getlength
    count = snippets.num_fitting(words, style, 200)
    assert length(" ".join(words[:count])) <= 200 < length(" ".join(words[: count + 1]))
    assert snippets.num_fitting(["unforeseeably"], style, 5) == 1
