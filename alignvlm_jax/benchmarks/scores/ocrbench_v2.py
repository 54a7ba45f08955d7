"""Scores of the text tasks of OCRBench v2.

How an answer is scored depends on the type of its question, which is the source of the record:
`TYPE`, or `TYPE/EVAL` where the set has a value in its column `eval`. The score of a language is
the mean over its types, and that of a type the mean over its questions. Scores of a type equal
those of the reference (Yuliang-Liu/MultimodalOCR, OCRBench_v2/eval_scripts) on the recorded cases
of the tests here. Its own mean, over eight English and five Chinese abilities, needs the types of
`NOT_SCORED` too: the mean here is another number.

Quirks of the reference, all kept:
  - an answer of less than five words is right wherever it stands in the prediction: "1" in "213",
    and an empty one in everything; a longer one scores its likeness, from a half on;
  - in Chinese, white space does not count, and less than four parts with commas between are short;
  - of a multiple choice the letters of the whole prediction have to equal the answer: for "A", "A."
    is right, "a" and "The answer is A" are wrong;
  - a count is the first number of a prediction, as in "in 2024 there were 3", and scores nothing
    from half the answer away; with `exact match` its digits may stand anywhere;
  - of key information a value is right or wrong, without white space and case; what is no JSON and
    no Python is searched for `key: value`; a key too many counts like a wrong value; where the
    wanted fields are in neither language, the question scores 0;
  - formulas are compared as texts, without spaces.
Two differ: of several answers to a multiple choice the first counts, and wanted values that are
numbers are compared as texts, where the reference stops.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from alignvlm_jax.benchmarks.scores.task import LEFT_OUT, Task
from alignvlm_jax.errors import UserError, nearest

LEAST_ALIKE = 0.5
MAX_WORDS = 4
"""Most words of an answer that is looked for in the prediction."""
MAX_PARTS = 3
"""Most parts of a Chinese answer that is, with commas between."""
SHORT_ANSWER = "简答"
"""Says in a question that it asks for a text, not for the letters or words that fill its gaps."""
GAPS = ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和")
"""What may stand between the letters that answer a question with several gaps."""
FENCED = re.compile(r"```(?:python|json)?\n(.*?)\n```", re.DOTALL | re.IGNORECASE)
# Possessive: a page of white space would else take minutes.
FIELD = re.compile(r"""["']?([\w\s]++)(?:["']\s*)?[:=]\s*["']?([^\n,"'{}]+)["']?""")
TEXT_TAG = re.compile(r"\\text\{([^{}]*)\}")

Scorer = Callable[[str, Sequence[str]], float]


def english(
    prediction: str, answers: Sequence[str], question: str, kind: str
) -> dict[str, tuple[float, float]]:
    """Returns the score and the weight of a question by its type, empty for other languages.

    Args:
      prediction: the answer.
      answers: those that are accepted.
      question: the text of the question.
      kind: its type, as the module has it.

    Raises:
      UserError: there is no such type, or no such way to evaluate it.
    """
    return _of_language("en", prediction, answers, question, kind)


def chinese(
    prediction: str, answers: Sequence[str], question: str, kind: str
) -> dict[str, tuple[float, float]]:
    """Returns the same as `english` for questions in Chinese."""
    return _of_language("cn", prediction, answers, question, kind)


def left_out(
    prediction: str, answers: Sequence[str], question: str, kind: str
) -> tuple[float, float]:
    """Returns 1 for a question that is not scored, else 0, and its weight."""
    return float(_scorer(question, kind) is None), 1.0


def _of_language(
    language: str, prediction: str, answers: Sequence[str], question: str, kind: str
) -> dict[str, tuple[float, float]]:
    (name, _, _) = kind.partition("/")
    scorer = _scorer(question, kind)
    # The last word of a type is its language.
    if scorer is None or not name.endswith(f" {language}"):
        return {}
    return {name: (scorer(prediction, answers), 1.0)}


def _scorer(question: str, kind: str) -> Scorer | None:
    """Returns what scores a question, or None if nothing here does."""
    (name, _, way) = kind.partition("/")
    if name in NOT_SCORED or (name == HANDWRITTEN and SHORT_ANSWER in question):
        return None
    if name not in SCORERS:
        raise UserError(
            f"the source of a record is no type of OCRBench v2: {name!r}"
            f"{nearest(name, [*SCORERS, *NOT_SCORED])}"
        )
    scorers = SCORERS[name]
    # What has one scorer is scored by it, whatever its set says.
    way = way if len(scorers) > 1 else ""
    if way not in scorers:
        raise UserError(
            f"OCRBench v2 does not evaluate {name!r} by {way!r}: the source of a record is "
            f"{' or '.join(sorted(f'{name}/{one}'.rstrip('/') for one in scorers))}"
        )
    return scorers[way]


def _plain(text: str) -> str:
    return text.strip().replace("\n", " ")


def _squeezed(text: str) -> str:
    return _plain(text).replace(" ", "")


def _contained(
    prediction: str, answers: Iterable[str], clean: Callable[[str], str], is_short: Callable
) -> float:
    """Returns 1.0 if a prediction contains a short answer; else its likeness to the closest one."""
    prediction = clean(prediction)
    best = 0.0
    for answer in map(clean, answers):
        if is_short(answer):
            # A longer answer that is contained gains nothing by it.
            best = max(best, float(answer in prediction))
        elif (alike := Levenshtein.normalized_similarity(prediction, answer)) >= LEAST_ALIKE:
            best = max(best, alike)
    return best


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of an answer to a question in English."""
    return _contained(prediction, answers, lambda text: _plain(text.lower()), _has_few_words)


def vqa_with_case(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of an answer of which upper and lower case count."""
    return _contained(prediction, answers, _plain, _has_few_words)


def vqa_chinese(prediction: str, answers: Sequence[str]) -> float:
    """Returns the score of an answer to a question in Chinese."""
    return _contained(
        prediction,
        answers,
        lambda text: _squeezed(text.lower()),
        lambda answer: len(answer.split(",")) <= MAX_PARTS,
    )


def _has_few_words(answer: str) -> bool:
    return len(answer.split()) <= MAX_WORDS


def choice(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the letters of a prediction are the choice."""
    # `isalpha` takes the letters of all scripts, so that a Chinese sentence is wrong as well.
    return float("".join(filter(str.isalpha, prediction)) == answers[0])


def count_exactly(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if a prediction contains one of the answers."""
    return float(any(_plain(answer.lower()) in prediction for answer in answers))


def count_nearly(prediction: str, answers: Sequence[str]) -> float:
    """Returns how near the first number of a prediction is to one of the answers; below a half,
    0."""
    # A sign or a point is none of it: "-3" is 3, and "2.5" is 2.
    found = re.search(r"\d+", prediction)
    number = int(found.group()) if found else 0
    best = 0.0
    # Every answer is read, so that one that is no number is found without a prediction.
    for wanted in map(int, answers):
        if 0 < number < 2 * wanted:
            near = 1.0 - abs(number - wanted) / wanted
            best = max(best, near if near > LEAST_ALIKE else 0.0)
    return best


def formula(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if a prediction contains one of the answers, without spaces."""
    return float(any(_squeezed(answer) in _squeezed(prediction) for answer in answers))


def formula_chinese(prediction: str, answers: Sequence[str]) -> float:
    """Returns the same as `formula`, without the tags around texts."""
    return formula(TEXT_TAG.sub(r"\1", prediction), [TEXT_TAG.sub(r"\1", one) for one in answers])


def gaps(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if a prediction contains the letters that answer a question, parted in any of the
    ways of `GAPS`."""
    return float(any(gap.join(answers[0]) in prediction for gap in GAPS))


def fields(prediction: str, answers: Sequence[str]) -> float:
    """Returns the fraction of the keys, wanted or predicted, whose value is right: equal to one of
    those that are accepted."""
    found = {key: _squeezed(value.lower()) for key, value in predicted_fields(prediction).items()}
    wanted = {
        key: value if isinstance(value, list) else [value]
        for key, value in _wanted_fields(answers[0]).items()
    }
    # An empty list of values leaves nothing that would be right, for the other keys as well.
    if not all(wanted.values()):
        return 0.0
    # A key that need not have a value is as good as none, unless it is predicted.
    keys = found.keys() | {key for key, values in wanted.items() if None not in values}
    right = sum(
        value in {_squeezed(str(one).lower()) for one in wanted.get(key, ()) if one is not None}
        for key, value in found.items()
    )
    return right / len(keys) if keys else 0.0


def _wanted_fields(answer: str) -> Mapping[str, Any]:
    """Returns the fields that an answer has, in JSON or as Python writes them; {} for neither."""
    value: Any = answer.strip('"')
    # Some are a text within a text.
    for _ in range(2):
        if isinstance(value, str):
            value = _parsed(value)
    return value if isinstance(value, dict) else {}


def _parsed(text: str) -> Any:
    """Returns the value that a text is in JSON or in Python, None if in neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def predicted_fields(prediction: str) -> dict[str, str]:
    """Returns the fields that a prediction gives, in JSON, as Python writes them, or as lines of
    `key: value`; empty where it gives none."""
    # Without a fence that ends, the whole text is taken, with the ticks.
    fenced = FENCED.search(prediction)
    content = fenced.group(1) if fenced else prediction.strip()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = _parsed(content)
        # A list or a number is an answer too, and a wrong one: it is not searched.
        if value is None:
            value = {key.strip(): text.strip() for key, text in FIELD.findall(content)}
    # One key that is a number spoils all: the reference takes keys for texts.
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return {}
    return {key.strip(): str(one).strip() for key, one in value.items()}


HANDWRITTEN = "handwritten answer extraction cn"
_VQA = {"": vqa, "multiple choice": choice, "case sensitive": vqa_with_case}
_VQA_CHINESE = _VQA | {"": vqa_chinese}
SCORERS: dict[str, dict[str, Scorer]] = {
    "text recognition en": _VQA,
    "document classification en": _VQA,
    "cognition VQA en": _VQA,
    "diagram QA en": _VQA,
    "reasoning VQA en": _VQA,
    "science QA en": _VQA,
    "APP agent en": _VQA,
    "ASCII art classification en": _VQA,
    "math QA en": _VQA,
    "text counting en": {"exact match": count_exactly, "regression": count_nearly},
    "key information extraction en": {"": fields},
    "key information mapping en": {"": fields},
    "formula recognition en": {"": formula},
    "cognition VQA cn": _VQA_CHINESE,
    "reasoning VQA cn": _VQA_CHINESE,
    "key information extraction cn": {"": fields},
    HANDWRITTEN: {"": gaps},
    "formula recognition cn": {"": formula_chinese},
}
"""What scores a type of questions, by its value of `eval`; "" where it has none."""
NOT_SCORED = (
    *("text grounding en", "VQA with position en", "text spotting en"),
    *("document parsing en", "chart parsing en", "table parsing en"),
    *("document parsing cn", "table parsing cn"),
    *("full-page OCR en", "fine-grained text recognition en", "full-page OCR cn"),
    "text translation cn",
)
"""Types of which boxes, trees (TEDS), or METEOR with its lexicon are compared."""

TASK = Task(
    "ocrbench_v2",
    "test",
    {"english": english, "chinese": chinese, LEFT_OUT: left_out},
    answer=str,
    max_new_tokens=1024,
    sees_question=True,
    leaves_out="questions for boxes, trees or texts that METEOR compares with a lexicon",
)
