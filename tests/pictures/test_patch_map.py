"""A lens shows itself: readings, the still picture, the page to hover over."""

import dataclasses
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data import stage_data
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.pictures import patch_map

VOCAB = 64


@pytest.fixture(scope="module")
def tokenizer(trained_workdir):
    config = loading.load_config(trained_workdir)
    return stage_data.load_tokenizer(config.data, config.model)


@pytest.fixture
def drawn(tokenizer):
    """Four patches: wavering between "1" and "l", certain of "7", ignorant, and blank; and one of
    the overview."""
    seven, one, small_l = (tokenizer.encode(text)[0] for text in "71l")
    space = tokenizer.space_id
    return patch_map.Lens(
        page=Image.new("RGB", (16, 16), "white"),
        boxes=np.array(
            [[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16], [0, 0, 16, 16]], float
        ),
        tokens=np.array([[one, small_l], [seven, one], [one, seven], [space, one], [small_l, one]]),
        probabilities=np.array(
            [[0.5, 0.5], [1, 0], [1 / VOCAB, 1 / VOCAB], [1, 0], [0.75, 0.25]], np.float32
        ),
        entropies=np.array([1, 0, np.log2(VOCAB), 0, 0.81], np.float32),
        is_overview=np.array([False] * 4 + [True]),
        tokenizer=tokenizer,
        vocab_size=VOCAB,
    )


def data_of(page: str) -> dict:
    """What the page's script reads."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_readings_run_from_certain_to_ignorant_and_skip_spaces(drawn):
    found = patch_map.readings(drawn, count=6)
    assert [round(reading.entropy, 3) for reading in found] == [0, 1, 6]
    assert found[0].tokens[0] == ("7", 1.0)
    assert {found[1].tokens[0][0], found[1].tokens[1][0]} == {"1", "l"}
    assert [reading.image.size for reading in found] == [(8, 8)] * 3
    assert [reading.entropy for reading in patch_map.readings(drawn, count=2)] == [
        found[0].entropy,
        found[2].entropy,
    ]


def test_the_picture_tints_by_entropy(drawn):
    picture = Image.open(io.BytesIO(patch_map.picture(drawn))).convert("RGB")
    assert picture.width == pytest.approx(patch_map.PICTURE_INCHES * patch_map.DPI, abs=2)

    def color(x: float, y: float) -> np.ndarray:
        return np.array(picture.getpixel((int(x * picture.width), int(y * picture.width))), int)

    certain = color(0.7, 0.1)
    ignorant = color(0.3, 0.6)
    blank = color(0.7, 0.6)
    np.testing.assert_array_equal(certain, blank)
    assert np.abs(certain - ignorant).max() > 40


def test_the_page_holds_what_every_patch_says(drawn):
    data = data_of(drawn.html())
    assert len(data["boxes"]) == len(data["entropies"]) == len(drawn) == 5
    np.testing.assert_allclose(np.array(data["boxes"]) * 16, drawn.boxes)
    for i in range(len(drawn)):
        said = [
            (data["pieces"][token], p)
            for token, p in zip(data["tokens"][i], data["probabilities"][i], strict=True)
        ]
        assert [piece for piece, _ in said] == [piece for piece, _ in drawn.top(i)]
        np.testing.assert_allclose([p for _, p in said], drawn.probabilities[i], atol=1e-5)
    assert data["pieces"][data["space"]] == "␣" and data["overview"] == [4] and data["bits"] == 6


def test_the_page_needs_no_other_file_and_runs_nothing_that_a_token_spells(
    drawn, tokenizer, monkeypatch
):
    monkeypatch.setattr(
        type(tokenizer), "piece", lambda self, token: "</script><script>alert(1)</script>"
    )
    page = drawn.html(title="<b>page</b>")
    # Its own two scripts; the title is text.
    assert page.count("<script") == page.count("</script>") == 2 and "<b>page" not in page
    assert data_of(page)["pieces"][0] == "</script><script>alert(1)</script>"
    assert [source[:22] for source in re.findall(r'(?:src|href)="([^"]*)', page)] == [
        "data:image/png;base64,"
    ]
    assert set(re.findall(r"https?://[^\s\"]*", page)) == {
        "http://www.w3.org/2000/svg"
    }  # A name, which nothing fetches.


def test_the_switch_to_the_overview_is_there_only_with_one(drawn):
    assert 'id="overview"' in drawn.html()
    assert 'id="overview"' not in drawn.detail().html() and len(drawn.detail()) == 4


def test_a_notebook_shows_the_page_in_a_frame(drawn):
    frame = drawn._repr_html_()
    assert (
        html.unescape(re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', frame)[1])
        == drawn.html()
    )


def test_saves_the_page_or_the_picture(drawn, tmp_path):
    assert data_of(drawn.save(tmp_path / "a.html").read_text())["width"] == 16
    assert Image.open(drawn.save(str(tmp_path / "a.png"))).format == "PNG"
    with pytest.raises(UserError, match=r"cannot save a lens as a\.pdf: .* \.html"):
        drawn.save(tmp_path / "a.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"]


def test_a_tokenizer_without_a_space_shows_all_words(drawn):
    other = dataclasses.replace(
        drawn, tokens=np.where(drawn.tokens == drawn.tokenizer.space_id, 9, drawn.tokens)
    )
    assert data_of(other.html())["space"] == -1
