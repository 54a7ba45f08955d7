"""Every public set of the list is read without a flag, and as what it is."""

import re

import pytest

from alignvlm_jax.data.record import Turn
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import REGISTRY, survey
from alignvlm_jax.ingest.formats.hub import choice, known_sets
from alignvlm_jax.ingest.formats.parquet import Parquet
from tests.ingest.formats.hub import public_sets
from tests.ingest.formats.hub.public_sets import DOCUMENTS, ROWS, picture

EXPECTED = {
    "FineVision": [
        (
            "cocoqa",
            [picture(1), picture(2)],
            [Turn("Which is darker?", ("The first.",)), Turn("By how much?", ("By ten.",))],
            True,
        ),
        ("text_sums", [], [Turn("What is 2 + 2?", ("4",))], False),
    ],
    "Docmatix": [
        (
            "parquet",
            [picture(3)],
            [Turn("What is the total?", ("12.50",)), Turn("When is it due?", ("In May.",))],
            False,
        )
    ],
    "the_cauldron": [
        (
            "AI2D",
            [picture(4)],
            [
                Turn("Is it dark?\nChoices:\nA: yes\nB: no", ("Answer: A",)),
                Turn("Is it wide?", ("no",)),
            ],
            False,
        )
    ],
    "LLaVA-OneVision": [
        (
            "magpie",
            [picture(5)],
            [Turn("What animal is it?", ("A cat.",)), Turn("And its eyes?", ("Green.",))],
            True,
        ),
        ("sums", [], [Turn("What is 3 + 3?", ("6",))], False),
    ],
    "MP-DocVQA": [
        (
            "parquet",
            [picture(6), picture(7)],
            [Turn("What is the total?", ("12.50", "12,50"), "9")],
            False,
        )
    ],
    "SlideVQA": [
        (
            "parquet",
            [picture(8), picture(9), picture(10)],
            [Turn("How many slides?", ("3",), "4")],
            False,
        )
    ],
    "OCRBench": [
        ("IIIT5K", [picture(11)], [Turn("What is written in the image?", ("CENTRE",))], False)
    ],
    "OCRBench-v2": [
        (
            "text counting en/regression",
            [picture(12)],
            [Turn("How many a?", ("3",), "17")],
            False,
        ),
        (
            "key information extraction en",
            [picture(18)],
            [Turn("What is the total?", ("12.50", "12,50"), "18")],
            False,
        ),
    ],
    "ChartQAPro": [
        (
            "parquet",
            [picture(13)],
            [
                Turn("Of rain in millimetres.\nWhich is highest?", ("May",)),
                Turn("And by how much?", ("3",)),
            ],
            True,
        ),
        ("parquet", [picture(14)], [Turn("Which is lowest?", ("June",))], False),
    ],
    "CORD": [
        (
            "parquet",
            [picture(15)],
            [
                Turn(
                    known_sets.JSON_PROMPT,
                    ('{"menu": [{"nm": "Tea", "price": "2.00"}], "total": "2.00"}',),
                )
            ],
            False,
        )
    ],
    "ScienceQA": [
        (
            "parquet",
            [picture(16)],
            [Turn("Think of water.\nWhich is cold?\nA. ice\nB. fire", ("ice", "A"))],
            False,
        ),
        (
            "parquet",
            [],
            [Turn("Which is a noun?\nA. run\nB. tree\nC. red", ("tree", "B"))],
            False,
        ),
    ],
    "AI2D": [
        (
            "parquet",
            [picture(17)],
            [Turn("What eats the frog?\nA. snake\nB. grass\nC. sun\nD. fly", ("snake", "A"))],
            False,
        )
    ],
}
TOLD = {
    "Docmatix": "Docmatix-the_cauldron",
    "the_cauldron": "Docmatix-the_cauldron",
    "CORD": "Donut",
}


def prepared(prepare, source):
    """Without flags: the format, too, is told by the source."""
    name = survey.survey(str(source)).format("", "", "")
    form = REGISTRY[name]()
    return prepare(form, source), " ".join(form.notes(str(source)))


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_are_read_without_flags(name, tmp_path, prepare):
    path = public_sets.write_rows(tmp_path / "train-0.parquet", ROWS[name])
    found, notes = prepared(prepare, path)
    read = [
        (record.source, list(record.images), list(record.turns), record.is_conversation)
        for record in found.records()
    ]
    assert read == EXPECTED[name] and not found.rejected()
    assert f"read as {TOLD.get(name, name)} (columns " in notes


def test_system_messages_are_kept(tmp_path, prepare):
    path = public_sets.write_rows(tmp_path / "a.parquet", ROWS["LLaVA-OneVision"])
    found, _ = prepared(prepare, path)
    assert [record.system for record in found.records()] == ["", "Be short."]


def test_pdfs_of_docmatix_are_drawn_and_their_words_read(tmp_path, prepare):
    path = public_sets.write_rows(tmp_path / "a.parquet", ROWS["Docmatix-pdf"])
    found, notes = prepared(prepare, path)
    [record] = found.records()
    assert "read as Docmatix-pdf (columns pdf, texts)" in notes
    assert len(record.images) == 2 and record.source == "parquet"
    pages = [[word.text for line in page for word in line] for page in record.lines]
    assert pages == [["Total", "12.50"], ["Second", "page"]]
    assert [turn.answers for turn in record.turns] == [("12.50",), ("The second.",)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_pixparse_are_read_without_flags(name, tmp_path, prepare):
    path = public_sets.write_document(tmp_path / "a.tar", name, public_sets.document())
    found, notes = prepared(prepare, path)
    first, second = found.records()
    assert (first.id, first.source, second.id) == ("a/0001-0001", "pixparse", "a/0001-0002")
    assert [[word.text for word in line] for line in first.lines[0]] == [
        ["Total", "12.50"],
        ["due"],
    ]
    assert [word.confidence for word in second.lines[0][0]] == [0.5, 0.5]
    assert f"read as pixparse's (NAME.{DOCUMENTS[name][0]} beside" in notes


def test_each_set_is_told_by_its_own_columns():
    for known in known_sets.KNOWN_SETS:
        columns = [name for name in vars(known.columns).values() if name and name[-1] != "_"]
        names = list(dict.fromkeys([*known.tells, *columns]))
        chosen = choice.choose(names, "x", flags={})
        assert chosen.known == known and known.tells[0] in chosen.why, known.name
        assert set(chosen.names()) >= {*columns}


@pytest.mark.parametrize(
    ("columns", "reason"),
    {
        "image question answer answers": "may be of several sets: question-answer (image, "
        "question, answer); question-answers (image, question, answers); name one by --known_set",
        "image images question answer texts": "may be of several sets: Docmatix-the_cauldron",
        "image question answers questionId docId conversations": "of several sets: LLaVA-OneVision",
        "image question answer choices_a": "may need: choices_a;",
        "image query label options": "read as ChartQA (columns image, query, label), has more that "
        "a question may need: options; name it by --choices_column or",
        "image question answer A B C": "may need: A, B, C;",
        "image question answer context": "may need: context;",
        "image question answer page_2": "may need: page_2;",
        "image question answer history": "may need: history;",
        "image caption": "has columns image, caption, of no set that is known; name "
        "--image_column, --question_column, --answer_column; known: FineVision, ",
        "image_1 question options answer": "name --image_column, ",
        "image image question answer": "two columns 'image'",
    }.items(),
)
def test_what_is_ambiguous_is_refused_with_the_candidates(columns, reason):
    with pytest.raises(UserError) as raised:
        choice.choose(columns.split(), "x.parquet", flags={})
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_ambiguous_is_solved_by_a_flag():
    names = ["image", "question", "answer", "answers", "options", "hint"]
    chosen = choice.choose(
        ["image", "question", "answer", "answers"], "x", flags={}, wanted="question-answers"
    )
    assert chosen.columns.answer == "answers"
    chosen = choice.choose(names, "x", flags={}, ignored=["answers", "hint"])
    assert chosen.known.name == "AI2D"
    flags = {"image": "image", "question": "question", "answer": "answers", "choices": "options"}
    with pytest.raises(UserError, match="may need: hint"):
        choice.choose(names, "x", flags=flags)
    chosen = choice.choose(names, "x", flags=flags | {"context": "hint"})
    assert chosen.known == choice.OWN and chosen.columns.context == "hint"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"known_set": "FineVison"}, "--known_set is 'FineVison'; did you mean 'FineVision'"),
        ({"known_set": "SlideVQA"}, "--known_set=SlideVQA: .* no column 'page_1'"),
        ({"ignore_columns": "sourse"}, "no column 'sourse'; did you mean 'source'"),
        ({"prompt": "Why?"}, "--prompt is for a set without questions; .* has 'texts'"),
        (
            {"answer_field": "a"},
            "--answer_field is for .* questions; .* as FineVision, by .*'texts'",
        ),
        ({"choices_column": "source"}, "--choices_column is for a set with a column of questions"),
        ({"source_column": "relevance"}, "no column 'relevance'; did you mean 'relevance_"),
    ],
)
def test_flags_that_fit_nothing(options, reason, tmp_path):
    path = public_sets.write_rows(tmp_path / "a.parquet", ROWS["FineVision"])
    with pytest.raises(UserError, match=reason):
        Parquet(**options).units(str(path))


def test_a_prompt_is_for_sets_without_questions(tmp_path, prepare):
    path = public_sets.write_rows(tmp_path / "a.parquet", ROWS["OCRBench"])
    with pytest.raises(UserError, match=r"--prompt is for a set without questions; .*'question'"):
        Parquet(prompt="Why?").units(str(path))
    path = public_sets.write_rows(tmp_path / "b.parquet", ROWS["CORD"])
    form = Parquet(prompt="Which total?", answer_field="gt_parse.total")
    [record] = prepare(form, path).records()
    assert record.turns == (Turn("Which total?", ("2.00",)),)


def test_a_source_by_flag(tmp_path, prepare):
    path = public_sets.write_rows(tmp_path / "a.parquet", ROWS["ScienceQA"])
    records = prepare(Parquet(source_column="subject"), path).records()
    assert [record.source for record in records] == ["natural science", "language science"]


def test_files_of_a_folder_are_told_one_by_one(tmp_path):
    for name in ("FineVision", "AI2D"):
        public_sets.write_rows(tmp_path / f"{name}.parquet", ROWS[name])
    lines = list(Parquet().notes(str(tmp_path)))
    assert len(lines) == 2 and lines[0].startswith("AI2D.parquet, 1 file: read as AI2D")
    assert re.search(r"not read: .*formatting_min", lines[1])
