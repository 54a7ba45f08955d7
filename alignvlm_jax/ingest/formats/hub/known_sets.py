"""The public sets whose columns are known: what tells that a file is of one, what is read of it.

A further set is an entry of `KNOWN_SETS`; `choice` finds the one of a file.
"""

import dataclasses

JSON_PROMPT = "Write what the document says as JSON."


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns of a set, by what they hold; "" for what it does not have.

    Attributes:
      image: an image, or a list of images.
      pages: what the names of columns with a page each begin with: `page_` of page_1, page_2, ...
      pdf: a PDF file, whose pages are the images.
      question: a question, or a list of questions.
      answer: an answer, or a list of answers.
      texts: a list of {user, assistant}, or of messages.
      choices: the choices of a question.
      context: a text that the question is about.
      kind: the kind of a question.
      evidence: the numbers of the pages that answer, or the names of all pages.
      id: an id of the row; only where ids are unique, else rows are numbered.
      document: the document, which is held out whole.
      source: the data set that the row is from.
      way: how the answer is evaluated, which goes on from the source as SOURCE/WAY.
    """

    image: str = ""
    pages: str = ""
    pdf: str = ""
    question: str = ""
    answer: str = ""
    texts: str = ""
    choices: str = ""
    context: str = ""
    kind: str = ""
    evidence: str = ""
    id: str = ""
    document: str = ""
    source: str = ""
    way: str = ""


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """A set, or several of one shape.

    Attributes:
      name: its name, for `--known_set`.
      tells: the columns by which it is told.
      columns: its columns; those that a file does not have are left out.
      turns: how the values of a row become turns, a key of `rows.READERS`.
      without_image: the cell that a record of text alone has in place of images: "null", "empty"
        for an empty list, or "" where each has an image.
      answer_field: where the answer stands in a JSON value, as `--answer_field`.
      prompt: what is asked where there is no column of questions.
    """

    name: str
    tells: tuple[str, ...]
    columns: Columns
    turns: str = "questions"
    without_image: str = ""
    answer_field: str = ""
    prompt: str = ""


_PLAIN = Columns(image="image", question="question", answer="answer")
_PLURAL = dataclasses.replace(_PLAIN, answer="answers")
_TEXTS = Columns(image="images", texts="texts")
_BIGDOCS = Columns(image="images", question="queries", answer="annotations")

KNOWN_SETS = (
    # Some of its sets go on from turn to turn, as those of LLaVA-Instruct do.
    KnownSet(
        "FineVision",
        ("images", "texts", "source"),
        dataclasses.replace(_TEXTS, source="source"),
        turns="pairs in order",
        without_image="empty",
    ),
    # The images of Docmatix, and the_cauldron: their columns are the same.
    KnownSet(
        "Docmatix-the_cauldron",
        ("images", "texts"),
        _TEXTS,
        turns="pairs",
        without_image="empty",
    ),
    # The same questions, with the files whose pages those images are.
    KnownSet("Docmatix-pdf", ("pdf", "texts"), Columns(pdf="pdf", texts="texts"), turns="pairs"),
    # Its ids are not unique.
    KnownSet(
        "LLaVA-OneVision",
        ("image", "conversations"),
        Columns(image="image", texts="conversations", source="data_source"),
        turns="conversation",
        without_image="null",
    ),
    # What TRL and other trainers read.
    KnownSet(
        "messages",
        ("images", "messages"),
        Columns(image="images", texts="messages"),
        turns="conversation",
        without_image="empty",
    ),
    # Of lmms-eval: up to 20 pages; answers are the text of a list.
    KnownSet(
        "MP-DocVQA",
        ("image_1", "question", "answers"),
        Columns(
            pages="image_",
            question="question",
            answer="answers",
            evidence="page_ids",
            id="questionId",
            document="doc_id",
        ),
        turns="questions of pages",
    ),
    # Whole decks of slides, of which a few have the answer.
    KnownSet(
        "SlideVQA",
        ("page_1", "question", "answer"),
        Columns(
            pages="page_",
            question="question",
            answer="answer",
            evidence="evidence_pages",
            id="qa_id",
            document="deck_name",
        ),
        turns="questions of pages",
    ),
    # Without the kind of question, it would be told as any set of questions.
    KnownSet(
        "OCRBench",
        ("dataset", "image", "question", "question_type", "answer"),
        dataclasses.replace(_PLAIN, source="dataset"),
    ),
    # Its boxes are for some kinds of question alone, and are not read.
    KnownSet(
        "OCRBench-v2",
        ("dataset_name", "image", "question", "type", "answers"),
        # By its type and way of evaluation a question is scored (benchmarks.scores.ocrbench_v2).
        dataclasses.replace(_PLURAL, id="id", source="type", way="eval"),
    ),
    # Lists also where there is a single question.
    KnownSet(
        "ChartQAPro",
        ("image", "Question", "Answer"),
        Columns(
            image="image",
            question="Question",
            answer="Answer",
            context="Paragraph",
            kind="Question Type",
        ),
    ),
    # What Donut reads: CORD, and others whose answer is a JSON text.
    KnownSet(
        "Donut",
        ("image", "ground_truth"),
        Columns(image="image", answer="ground_truth"),
        answer_field="gt_parse",
        prompt=JSON_PROMPT,
    ),
    # Half of its questions have no image; a hint may hold what is asked about.
    KnownSet(
        "ScienceQA",
        ("image", "question", "choices", "answer", "hint"),
        dataclasses.replace(_PLAIN, choices="choices", context="hint"),
        without_image="null",
    ),
    # Of lmms-eval, as many others with options: the answer is a number, written as text.
    KnownSet(
        "AI2D",
        ("image", "question", "options", "answer"),
        dataclasses.replace(_PLAIN, choices="options"),
    ),
    KnownSet(
        "multiple-choice",
        ("image", "question", "choices", "answer"),
        dataclasses.replace(_PLAIN, choices="choices"),
    ),
    # Those of before, of lmms-eval and BigDocs.
    KnownSet(
        "DocVQA",
        ("image", "question", "answers", "questionId", "docId"),
        dataclasses.replace(_PLURAL, id="questionId", document="docId"),
    ),
    KnownSet(
        "InfographicVQA",
        ("image", "question", "answers", "questionId", "image_url"),
        dataclasses.replace(_PLURAL, id="questionId", document="image_url"),
    ),
    KnownSet(
        "TextVQA",
        ("image", "question", "answers", "question_id", "image_id"),
        dataclasses.replace(_PLURAL, id="question_id", document="image_id"),
    ),
    KnownSet(
        "ChartQA",
        ("image", "query", "label"),
        Columns(image="image", question="query", answer="label"),
    ),
    KnownSet("question-answer", ("image", "question", "answer"), _PLAIN),
    KnownSet("question-answers", ("image", "question", "answers"), _PLURAL),
    KnownSet(
        "BigDocs",
        ("images", "queries", "annotations", "identifier"),
        dataclasses.replace(_BIGDOCS, id="identifier"),
    ),
    KnownSet(
        "BigDocs-Bench",
        ("images", "queries", "annotations", "sample_id"),
        dataclasses.replace(_BIGDOCS, id="sample_id"),
    ),
)
BY_NAME = {known.name: known for known in KNOWN_SETS}
