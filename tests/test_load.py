"""`alignvlm_jax.load`: a model to ask from Python, one page at a time or many."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import alignvlm_jax
from alignvlm_jax.commands import generate
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError

QUESTIONS = ("Who?", "What is the total?", "a b", "Who?", "b", "a")


@pytest.fixture(scope="module")
def model(trained_workdir):
    return alignvlm_jax.load(trained_workdir)


@pytest.fixture
def said(model, monkeypatch):
    """The token ids that were decoded, in the order of the batches."""
    decoded = []
    decode = type(model.loaded.tokenizer).decode

    def spy(self, ids):
        decoded.append(list(ids))
        return decode(self, ids)

    monkeypatch.setattr(type(model.loaded.tokenizer), "decode", spy)
    return decoded


def noise(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.fixture(scope="module")
def pages():
    """Of one tile and of two."""
    return [noise(i, 16, (16, 8)[i % 2]) for i in range(len(QUESTIONS))]


def test_many_answers_are_those_to_one_at_a_time(model, pages, said):
    alone = [model.answer(page, question) for page, question in zip(pages, QUESTIONS, strict=True)]
    # Two batches: the config's has four rows.
    together = model.answer(pages, QUESTIONS)
    assert together == alone and all(isinstance(answer, str) for answer in alone)
    count = len(QUESTIONS)
    assert len(said) == 2 * count and said[:count] == said[count:]
    assert len({tuple(ids) for ids in said}) > 3  # Else rows could have been mixed up.


def test_pages_and_text_alone_may_be_mixed_and_keep_their_order(model, pages):
    mixed = [pages[0], None, pages[1], None]
    questions = QUESTIONS[:4]
    assert model.answer(mixed, questions) == [
        model.answer(page, question) for page, question in zip(mixed, questions, strict=True)
    ]
    assert model.answer(None, "Who?") != model.answer(None, "a b")


def test_one_page_or_one_question_stands_for_all(model, pages):
    assert model.answer(pages[0], QUESTIONS[:3]) == [
        model.answer(pages[0], text) for text in QUESTIONS[:3]
    ]
    assert model.answer(pages[:3], "Who?") == [model.answer(page, "Who?") for page in pages[:3]]
    assert model.answer(pages[:1], "Who?") == [model.answer(pages[0], "Who?")]
    assert model.answer([], []) == []


def test_the_command_says_the_same(model, trained_workdir, pages, tmp_path, capsys):
    pages[1].save(tmp_path / "page.png")
    generate.main(
        [f"--checkpoint={trained_workdir}", f"--image={tmp_path / 'page.png'}", "--question=Who?"]
    )
    answer = capsys.readouterr().out.removesuffix("\n")
    assert answer == model.answer(tmp_path / "page.png", "Who?") == model.answer(pages[1], "Who?")
    assert (
        answer
        == model.answer(str(tmp_path / "page.png"), "Who?")
        == model.answer(np.asarray(pages[1]), "Who?")
    )


def test_max_new_tokens(model, pages, said):
    model.answer(pages[0], "Who?", max_new_tokens=2)
    assert len(said[0]) == 2


def test_takes_any_page_of_a_pdf(model, tmp_path, monkeypatch):
    pdf = tmp_path / "pages.pdf"
    noise(1).save(pdf, save_all=True, append_images=[noise(2, 32, 16)])
    asked = []
    monkeypatch.setattr(
        model, "_generate", lambda prompts, _: asked.append(prompts[0]["tiles"]) or [""]
    )
    model.answer(pdf, "Who?", page=2)
    model.answer(images.load_page(pdf, 2), "Who?")
    np.testing.assert_array_equal(asked[0], asked[1])
    assert model.lens(pdf, page=2).page.size == images.load_page(pdf, 2).size
    with pytest.raises(UserError, match="has no page 3: its pages are 1 to 2"):
        model.answer(pdf, "Who?", page=3)


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        ("none.png", "Who?", "cannot read none.png"),
        ([None, None, None], ["Who?", "a"], "there are 3 pages and 2 questions"),
        (np.zeros((4, 4, 2), np.uint8), "Who?", r"an array of uint8 \[4, 4, 2\] is no image"),
        (7, "Who?", "a int is no image"),
        (None, "Who?" * 20, "seq_len is 48"),
    ],
)
def test_bad_input_is_one_line(model, image, question, message):
    with pytest.raises(UserError, match=message) as error:
        model.answer(image, question)
    assert "\n" not in str(error.value)


def test_a_lens_holds_what_was_asked_for(model, pages):
    look = model.lens(pages[0], num_tokens=3)
    assert len(look) == 16 and look.tokens.shape == (16, 3) and len(look.top(0)) == 3
    assert repr(look).startswith("Lens(16 x 16 pixels, 16 patches, ")


def test_importing_the_package_and_its_data_needs_no_jax():
    program = (
        "import sys, alignvlm_jax, alignvlm_jax.data.examples; "
        "assert alignvlm_jax.load; assert 'jax' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=pathlib.Path(__file__).parent.parent
    )


def test_a_folder_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match="checkpoint"):
        alignvlm_jax.load(tmp_path)
