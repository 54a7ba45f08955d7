import string

import pytest

from alignvlm_jax.data.record import Word
from alignvlm_jax.errors import UsageError
from alignvlm_jax.ingest.formats.base import Raw
from alignvlm_jax.ingest.formats.pdf import sentences
from alignvlm_jax.ingest.formats.pdf.document import Pdf, record_of
from alignvlm_jax.ingest.formats.pdf.facts import fact, questioned
from alignvlm_jax.ingest.formats.pdf.language import LATIN, language
from alignvlm_jax.ingest.formats.pdf.questions import KINDS
from alignvlm_jax.ingest.formats.pdf.templates import NO, TEMPLATES, UNANSWERABLE, YES
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.make_pdf import table, text

BODY = [
    "The text of this page goes on for some lines,",
    "so that it is plain what is large and what is",
    "not, and that the language of the page is told",
    "from the words that are in it, as it should be.",
    "A last line of the paragraph ends before that.",
]
SIZE = (300, 400)


def body(y):
    return "".join(text(20, y - 12 * i, line, 9) for i, line in enumerate(BODY))


def answers(record):
    assert all(len(turn.answers) == 1 for turn in record.turns)
    return {turn.question: turn.answers[0] for turn in record.turns}


def of_kind(record, kind, language="en"):
    """The answers of a kind of question, by what stands in the question."""
    forms = [template.split("{")[0] for template in TEMPLATES[kind][language]]
    ends = [template.rsplit("}")[-1] for template in TEMPLATES[kind][language]]
    pairs = list(zip(forms, ends, strict=True))
    return {
        answer
        for question, answer in answers(record).items()
        if any(question.startswith(a) and question.endswith(b) for a, b in pairs)
    }


SECTIONS = (
    body(330)
    + text(20, 250, "2.3 Second things", 12, font="F2")
    + body(230)
    + text(20, 150, "2.4 Third things", 12, font="F2")
    + body(130)
)


def test_sections(read):
    (record,) = read([SECTIONS], size=SIZE, questions="sections")
    assert of_kind(record, "title") | of_kind(record, "next_section") | of_kind(record, "number") <= {
        "Second things", "Third things", "2.3", "2.4", "2.4 Third things"
    }  # fmt: skip
    assert len(record.turns) == 3
    (record,) = read([SECTIONS], size=SIZE, questions="facts")
    assert set(answers(record).values()) <= {"Yes", "No", UNANSWERABLE["en"]}


@pytest.mark.parametrize(
    "content",
    [
        # Of two lines; an item of a list; bold words within text; small ones.
        text(20, 352, "2.3 Second things", 12, font="F2") + text(20, 338, "and others", 12, font="F2"),
        text(20, 352, "12. Second things", 12, font="F2"),
        text(20, 342, "Second things", 9, font="F2"),
        text(20, 352, "2.3 Second things", 12),
        # A number in pieces, as of sections from right to left.
        text(20, 352, "2 . 3 Second things", 12, font="F2"),
        # Running heads below the margin, with the number of their page at either end.
        text(20, 352, "44", 10.5, font="F2") + text(190, 352, "Second things", 10.5, font="F2"),
        text(20, 352, "2.3 Second things", 10.5, font="F2") + text(270, 352, "45", 10.5, font="F2"),
    ],
)  # fmt: skip
def test_what_is_no_plain_heading_is_not_asked(read, content):
    (record,) = read([content + body(320) + body(200)], size=SIZE, questions="sections")
    assert of_kind(record, "title") == set() == of_kind(record, "number")


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (text(20, 350, "Version: 1.2", 9), "keys", {"1.2"}),
        # It may go on below; is a sentence; occurs twice.
        (text(20, 350, "Version: 1.2", 9) + text(30, 339, "and 1.3", 9), "keys", set()),
        (text(20, 350, "so it is: 1.2", 9), "keys", set()),
        (text(20, 350, "Version: 1.2", 9) + text(20, 100, "Version: 1.3", 9), "keys", set()),
        (text(20, 350, "Table 2.1: All of it", 9), "captions", {"All of it"}),
        (text(20, 350, "Table 2.1 shows all of it", 9), "captions", set()),
        (text(20, 350, "Table 2.1: All of", 9) + text(20, 339, "it", 9), "captions", set()),
        (text(20, 350, "1.2 Begin " + ". " * 20 + "17", 9), "contents", {"17"}),
        # The second line of an entry, as the one before has no page.
        (text(20, 361, "1.2 A long", 9) + text(40, 350, "begin " + ". " * 20 + "17", 9), "contents", set()),
        (text(20, 350, "\x95 one of them", 9) + text(20, 335, "\x95 the other", 9), "counts", {"2"}),
        (text(20, 385, "Head", 9) + text(250, 385, "2", 9), "facts", {"2"}),
        (text(250, 385, "1 / 20", 9), "facts", {"1"}),
        (text(20, 385, "2026", 9), "facts", set()),
    ],
)  # fmt: skip
def test_what_a_page_says(read, content, kind, expected):
    pages = ["", content + body(300)] if kind == "facts" else [content + body(300)]
    *_, record = read(pages, size=SIZE, questions=kind)
    assert set(answers(record).values()) == expected


def test_counts_of_a_table(read):
    rows = [["name", "size"], ["apple", "1"], ["pear", "2"], ["plum", "3"]]
    around = text(20, 350, "above", 9) + text(20, 60, "below", 9)
    (record,) = read([around + table(20, 300, [80, 80], rows)], size=SIZE, questions="counts")
    assert sorted(answers(record).values()) == ["2", "3"]
    # At the end of the page it may go on.
    (record,) = read([text(20, 350, "above", 9) + table(20, 300, [80, 80], rows)], size=SIZE, questions="counts")  # fmt: skip
    assert sorted(answers(record).values()) == ["2"]


def test_yes_and_no():
    class Always:
        def __init__(self, value):
            self.random = lambda: value
            self.choice = lambda values: values[0]

    facts = [
        fact("cell", value, name="name", key=key, column="size")
        for key, value in (("apple", "12"), ("pear", "9"), ("plum", "12 cm"))
    ]
    asked = [dict(found.fields)["value"] for found in questioned(facts, Always(0.9))]
    assert asked == ["12", "9", "12 cm"]
    # A value that holds the right one would be right, too.
    asked = [dict(found.fields)["value"] for found in questioned(facts, Always(0.1))]
    assert asked == ["9", "12", "9"]


def test_lines_go_on(read):
    (record,) = read([body(300)], size=SIZE, questions="lines")
    assert len(record.turns) == 2
    for question, answer in answers(record).items():
        (line,) = (line for line in BODY if line.endswith(answer))
        assert line.removesuffix(f" {answer}") in question


@pytest.mark.parametrize(
    "content",
    [
        # Of two columns, of an axis, of a list of contents.
        text(20, 350, "3 name = 12 mm", 9) + text(150, 350, "4 size = 17 mm", 9),
        "".join(text(20 + 40 * i, 350, str(2 * i + 12), 9) for i in range(7)),
        text(20, 350, "Some of the long entries . . . 47", 9),
    ],
)
def test_what_is_no_line_of_text_does_not_go_on(read, content):
    (record,) = read([content], size=SIZE, questions="lines")
    assert record.lines and not record.turns


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("אחת שתיים שלוש ארבע חמש שש שבע", 1),
        ("אחת שתיים (שלוש) ארבע חמש שש שבע", 0),
        ("text אחת שתיים ארבע חמש שש שבע", 0),
    ],
)
def test_lines_of_two_directions_are_not_asked(words, count):
    placed = [
        PlacedWord(Word(word, (300.0 - 40 * i, 100.0, 330.0 - 40 * i, 110.0)), False, em=10.0)
        for i, word in enumerate(words.split())
    ]
    page = sentences.read_page([sentences.read_text(placed, False, True)], 400, 0)
    assert len(list(sentences.facts_of_lines(page))) == count


def test_all_kinds_and_none(read):
    (record,) = read([SECTIONS], size=SIZE, questions=",".join(KINDS))
    assert len(record.turns) > 5
    (record,) = read([SECTIONS], size=SIZE, questions="none")
    assert record.turns == ()
    with pytest.raises(UsageError, match="did you mean 'tables'"):
        Pdf(questions="table")


def test_questions_depend_on_document_and_page_alone(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf.pdf([SECTIONS] * 3, size=SIZE))
    form = Pdf(holdout_by="page")

    def turns(name, page):
        return record_of(form, Raw(name, name, {"path": str(path), "page": page})).turns

    assert turns("a-0001", 0) == turns("a-0001", 0)
    assert len({turns(f"a-{page:04d}", 0) for page in range(9)}) > 1


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_of_a_kind_have_the_same_fields_in_all_languages(kind):
    spoken = {*LATIN, "ru", "zh"}
    assert set(TEMPLATES[kind]) == spoken == set(YES) == set(NO) == set(UNANSWERABLE)
    names = {
        frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name)
        for templates in TEMPLATES[kind].values()
        for template in templates
    }
    # A template may leave out the name of the column of keys.
    assert len({fields - {"name"} for fields in names}) == 1
    for templates in TEMPLATES[kind].values():
        assert len(set(templates)) == len(templates)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (" ".join(BODY), "en"),
        ("Das ist ein Text, der nicht lang ist und mit der Sprache auch für die Wörter steht", "de"),
        ("Le texte de la page est dans une langue que les lecteurs lisent pour ce qui est", "fr"),
        ("El texto de la página es para los que lo leen con una idea de las cosas por el mundo", "es"),
        ("Это страница на русском языке, и в ней есть слова", "ru"),
        ("Це сторінка українською мовою, і в ній є слова її", "en"),
        ("这一页是用中文写的，也有一些 Linux 命令", "zh"),
        ("このページは日本語で書かれています", "en"),
        ("Il testo della pagina non è per il lettore che una lingua con le parole del mondo", "en"),
        ("apt dpkg 12 17", "en"),
        ("", "en"),
    ],
)  # fmt: skip
def test_the_language_of_a_page(words, expected):
    assert language(words) == expected


def test_a_page_is_asked_in_its_language(read):
    lines = ["Das ist ein Text, der nicht lang ist", "und mit der Sprache auch die Zeilen", "und Wörter für die Seite zeigt, die", "den Leser auf das Thema und die Welt", "von heute bringt, und zu Ende ist es"]  # fmt: skip
    german = "".join(text(20, 250 - 12 * i, line, 9) for i, line in enumerate(lines))
    rows = [["Name", "Zahl"], ["Apfel", "1"], ["Birne", "2"], ["Quitte", "3"]]
    (record,) = read([german + table(20, 380, [80, 80], rows)], size=SIZE)
    assert len(record.turns) == 3
    assert all("„Zahl“" in turn.question for turn in record.turns)
