"""The answer alone on standard output; whatever is wrong with the input is said before a model is
loaded."""

import types

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.commands import generate
from alignvlm_jax.data import sandbox
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.inference import loading
from tests.ingest.formats.pdf import make_pdf


@pytest.fixture
def page(tmp_path):
    Image.new("RGB", (16, 16), "white").save(tmp_path / "page.png")
    return tmp_path / "page.png"


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded first"))


def test_prints_the_answer_alone(trained_workdir, page, capsys, monkeypatch):
    batches = []

    def load(path, config):
        tokenizer = loading.load_tokenizer(path, config.data, config.model)

        answer = [
            *tokenizer.encode("4 2\n\n"),
            tokenizer.special_tokens["<end>"],
            tokenizer.pad_id,
        ]
        state = types.SimpleNamespace(
            finished_B=np.ones(4, bool), tokens_BT=np.array([answer] * 4, np.int32)
        )

        def insert(variables, state, batch, rows):
            batches.append(batch)
            return state

        sampler = types.SimpleNamespace(
            data_parallel_size=4,
            rows_of_process=np.arange,
            idle=lambda *_, **__: state,
            insert=insert,
            advance=lambda variables, state, *_: state,
        )
        fields = {
            "path": path,
            "config": config,
            "data_parallel_size": 4,
            "tokenizer": tokenizer,
            "builder": ExampleBuilder.of(config, tokenizer),
            "variables": {},
            "metadata": loading.load_metadata(path),
            "params": {},
            "step": 7,
            "pdf_dpi": 144,
        }
        return types.SimpleNamespace(**fields, sampler=lambda: sampler)

    monkeypatch.setattr(loading, "load", load)
    generate.main([f"--checkpoint={trained_workdir}", f"--image={page}", "--question=Who?"])
    printed = capsys.readouterr()
    assert printed.out == "4 2\n"
    assert "16 x 16 pixels, 2 tiles" in printed.err
    assert "was trained on 56 sequences with pages" in printed.err and "cut at" not in printed.err
    # Of the bucket that holds its 23 tokens.
    assert batches[0]["tokens"].shape == (4, 32)
    # <s>, two tiles of eight patches, <user>, the four letters of the question, <assistant>.
    assert (batches[0]["segment_ids"].sum(1) == 1 + 16 + 1 + 4 + 1).all()


def test_answers_without_an_image(trained_workdir, capsys):
    """Through the whole model: the language model alone, as many tokens as asked for at most."""
    answers = []
    for count in (1, 3):
        generate.main(
            [f"--checkpoint={trained_workdir}", "--question=Who?", f"--max_new_tokens={count}"]
        )
        printed = capsys.readouterr()
        assert "no image" in printed.err
        assert f"cut at {count} token" in printed.err and "larger max_new_tokens" in printed.err
        answers.append(printed.out.removesuffix("\n"))
    assert len(answers[0]) < len(answers[1]) and answers[1].startswith(answers[0])


def test_several_questions_have_an_answer_each(trained_workdir, page, capsys):
    flags = [f"--checkpoint={trained_workdir}", f"--image={page}", "--max_new_tokens=3"]
    alone = []
    for question in ("Who?", "What?"):
        generate.main([*flags, f"--question={question}"])
        alone.append(capsys.readouterr().out)
    generate.main([*flags, "--question=Who?", "--question=What?"])
    printed = capsys.readouterr()
    assert printed.out == "".join(alone)
    assert printed.err.index("Who?\n") < printed.err.index("What?\n")


def test_without_a_question_the_page_is_read(trained_workdir, page, capsys):
    flags = [f"--checkpoint={trained_workdir}", f"--image={page}", "--max_new_tokens=3"]
    generate.main([*flags, f"--question={TRANSCRIBE_QUESTION}"])
    expected = capsys.readouterr().out
    generate.main(flags)
    printed = capsys.readouterr()
    assert printed.out == expected and "2 tiles" in printed.err
    with pytest.raises(UsageError, match=r"^there is neither --question nor --image"):
        generate.main(flags[:1])
    with pytest.raises(UsageError, match=r"^--temperature needs --question=TEXT"):
        generate.main([*flags, "--temperature=1"])


def test_takes_any_page_of_a_pdf(trained_workdir, tmp_path, no_model):
    pages = [Image.new("RGB", (40, 20), "white")] * 2
    pages[0].save(tmp_path / "pages.pdf", save_all=True, append_images=pages[1:])
    flags = [f"--checkpoint={trained_workdir}", f"--image={tmp_path / 'pages.pdf'}"]
    with pytest.raises(UserError, match=r"pages\.pdf has no page 3: its pages are 1 to 2"):
        generate.main([*flags, "--page=3", "--question=Who?"])
    with pytest.raises(pytest.fail.Exception):  # As far as the model.
        generate.main([*flags, "--page=2", "--question=Who?"])


def test_a_page_of_a_pdf_that_never_ends_is_one_line(
    trained_workdir, tmp_path, no_model, monkeypatch
):
    (tmp_path / "endless.pdf").write_bytes(make_pdf.endless())
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1.0)
    with pytest.raises(UserError, match=r"endless\.pdf, page 1: it takes more than 1 s"):
        generate.main(
            [
                f"--checkpoint={trained_workdir}",
                f"--image={tmp_path / 'endless.pdf'}",
                "--question=Who?",
            ]
        )


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        ("none.png", "Who?", "no image at .*none.png"),
        ("text.png", "Who?", "cannot read image .*text.png"),
        (
            "page.png",
            "Who?" * 20,
            "prompt has 99 tokens .*seq_len is 48; shorten the question by 51 tokens",
        ),
    ],
)
def test_bad_input_is_one_line(trained_workdir, page, no_model, image, question, message):
    (page.parent / "text.png").write_text("no image")
    with pytest.raises(UserError, match=message) as error:
        generate.main(
            [
                f"--checkpoint={trained_workdir}",
                f"--image={page.parent / image}",
                f"--question={question}",
            ]
        )
    assert "\n" not in str(error.value)


def test_a_missing_flag_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        generate.main(["--question=Who?"])
    assert exit_info.value.code == 2
    assert "--checkpoint" in capsys.readouterr().err
