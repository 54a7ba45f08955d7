"""`alignvlm_jax.load`: a model to ask from Python, one page at a time or many."""

import dataclasses
import pathlib
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

import alignvlm_jax
from alignvlm_jax import config as config_lib
from alignvlm_jax.commands import generate
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import assistant
from alignvlm_jax.weights import initial
from tests.scripted_sampler import ScriptedSampler

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


def test_a_model_shows_its_towers_connector_and_mesh(model):
    first, vision, connector, llm, mesh = repr(model).splitlines()
    config = model.loaded.config.model
    assert first == f"Assistant({model.loaded.path}, step {model.loaded.step:,})"
    assert f"{config.vision.num_layers} layers" in vision and f"{config.llm.num_layers}" in llm
    assert f"connector: {config.connector.name}(" in connector
    counts = [
        int(line.split("; ")[1].split()[0].replace(",", "")) for line in (vision, connector, llm)
    ]
    assert counts == [
        sum(x.size for x in jax.tree.leaves(model.loaded.params[name]))
        for name in ("vision", "connector", "llm")
    ]
    sizes = " x ".join(f"{axis} {size}" for axis, size in model.loaded.mesh.shape.items())
    assert mesh == f"  mesh: {sizes} on cpu"


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
        model, "_generate", lambda prompts, *_: asked.append(prompts[0]["tiles"]) or [""]
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
        (None, None, "None is no question: a text is, or a list of texts"),
        (None, ["Who?", 3], "3 is no question"),
        (None, " ", "a question is empty"),
        (None, "Where is the caf\udce9?", "has half a character at 16: it is no UTF-8"),
    ],
)
def test_bad_input_is_one_line(model, image, question, message):
    with pytest.raises(UserError, match=message) as error:
        model.answer(image, question)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("most", [0, -5, 1.5, "7"])
def test_the_length_of_an_answer_is_an_integer_from_1_on(model, pages, most):
    """0 would mean the default, and a negative one fails in the midst of a program."""
    for act in (model.answer, model.read):
        arguments = ("Who?",) if act == model.answer else ()
        with pytest.raises(UserError, match=rf"max_new_tokens is {most!r}; an integer from 1 on"):
            act(pages[0], *arguments, max_new_tokens=most)


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


def test_what_makes_answers_worthless_is_told(trained_workdir):
    """A page that is seen at a size at which nobody could read it, and a connector that was never
    trained."""
    loaded = alignvlm_jax.load(trained_workdir).loaded
    model = assistant.Assistant(dataclasses.replace(loaded, step=13))
    with pytest.warns(
        UserWarning,
        match=r"a page of 300 x 400 pixels is seen as 12 x 16, one pixel for 625 of the page: this "
        r"model reads pages of up to 2 tiles of 16 x 8 pixels",
    ):
        model.answer(noise(1, 300, 400), "Who?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "cut at ")
        model.answer(noise(1, 20, 16), "Who?")
        model.answer(None, "Who?")
    metadata = model.loaded.metadata | {"stage": initial.STAGE}
    untrained = assistant.Assistant(dataclasses.replace(model.loaded, metadata=metadata))
    with pytest.warns(UserWarning, match=r"connector of .*/7 is untrained: .* train it first"):
        untrained.lens(noise(1, 16, 8))
    config = model.loaded.config
    train = dataclasses.replace(config.train, visual_source="oracle")
    config = dataclasses.replace(config, train=train)
    blind = assistant.Assistant(dataclasses.replace(model.loaded, config=config))
    with pytest.warns(UserWarning, match=r"of stage 'train', which trains on labels in the place"):
        blind.lens(noise(1, 16, 8))


def test_a_connector_that_was_hardly_trained_is_told(trained_workdir, tmp_path):
    loaded = alignvlm_jax.load(trained_workdir).loaded
    said = "was trained on {} sequences with pages: its answers mean little yet"
    # Seven steps of eight.
    assert said.format(56) in assistant.problem_of(loaded)
    assert not assistant.problem_of(dataclasses.replace(loaded, step=13))

    def of(before, **changes):
        """The checkpoint of step 6, the second of a stage after one of 4 steps."""
        train = dataclasses.replace(loaded.config.train, **changes)
        first = dataclasses.replace(loaded.config, init_from=str(before), train=train)
        last = dataclasses.replace(first, stage="last")
        stages = config_lib.to_json((first, last))
        metadata = loaded.metadata | {"config": stages, "stage": "last"}
        return dataclasses.replace(loaded, config=last, metadata=metadata, step=6)

    # What a run began with counts, where that had a connector to load.
    assert not assistant.problem_of(of(trained_workdir))
    assert not assistant.problem_of(of(tmp_path / "gone"))
    fresh = of(tmp_path / "gone", load=("llm/.*", "vision/.*"))
    assert said.format(48) in assistant.problem_of(fresh)


def test_answers_that_are_cut_are_told(model, pages):
    ids = model.loaded.tokenizer.special_tokens
    with pytest.warns(UserWarning, match=r"^cut at 1 token; a larger max_new_tokens allows more"):
        model.answer(pages[0], "Who?", max_new_tokens=1)
    with pytest.warns(UserWarning, match=r"^2 of 2 answers: cut at 3 tokens"):
        model.answer(pages[0], ["Who?", "a"], max_new_tokens=3)
    ended = assistant.Assistant(model.loaded)
    for last in (ids["<end>"], model.loaded.tokenizer.pad_id):
        ended._sampler = ScriptedSampler(model.loaded.tokenizer, lambda _: "", 1)
        ended._sampler.end_id = last
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "cut at|.*answers: cut")
            ended.answer(pages[0], "Who?", max_new_tokens=3)


def test_a_pdf_is_drawn_as_it_was_for_training(trained_workdir, tmp_path):
    """Where the model saw others, letters would have another size than those it learnt."""
    noise(1, 72, 36).save(tmp_path / "page.pdf", resolution=72)
    model = alignvlm_jax.load(trained_workdir)
    assert model.lens(tmp_path / "page.pdf").page.size == (100, 50)
    described = [{"format": "documents"}, {"format": "pdf", "dpi": 100}]
    metadata = model.loaded.metadata | {"prepared": described}
    other = assistant.Assistant(dataclasses.replace(model.loaded, metadata=metadata))
    assert other.lens(tmp_path / "page.pdf").page.size == (100, 50)


def test_the_embeddings_of_a_prompt(model, pages):
    """Those of the text table, with the page's visual tokens at the image tokens."""
    loaded = model.loaded
    embeddings = model.embed(pages[0], "Who?")
    prompt = loaded.builder.prompt(pages[0], "Who?")
    tokens = prompt["tokens"][: int(prompt["segment_ids"].sum())]
    assert embeddings.shape == (len(tokens), loaded.config.model.llm.width)
    assert embeddings.dtype == np.float32
    is_image = tokens == loaded.config.model.image_token_id
    table = np.asarray(loaded.params["llm"]["embed"]["table"])
    np.testing.assert_array_equal(embeddings[~is_image], table[tokens[~is_image]])
    assert is_image.sum() and not np.isin(embeddings[is_image][:, 0], table[:, 0]).any()
    other = model.embed(pages[2], "Who?")
    assert (other[is_image] != embeddings[is_image]).any(-1).all()
    text = model.embed(None, "a b")
    assert len(text) < len(tokens)
    with pytest.raises(UserError, match="a question is empty"):
        model.embed(pages[0], " ")
