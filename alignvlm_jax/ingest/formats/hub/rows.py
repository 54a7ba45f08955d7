"""How the values of a row become turns: a reader for each shape of questions and answers.

`formats.turns` has what other formats share: pairs, messages and marks of images.
"""

import collections
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from alignvlm_jax.data.record import Turn
from alignvlm_jax.errors import nearest
from alignvlm_jax.ingest.formats import checks, files, turns
from alignvlm_jax.ingest.formats.base import Reject, Rejection

LETTERS = string.ascii_uppercase
CONVERSATIONAL = "conversational"
"""The kind of question that ChartQAPro gives to rows whose questions follow one another."""


class Content(NamedTuple):
    """What a row says beside its images.

    Attributes:
      turns: its questions and answers.
      is_conversation: whether the turns follow one another, or are independent questions.
      system: what the model is told before the first question.
      source: the data set that the row says it is from; "" if it does not.
    """

    turns: tuple[Turn, ...]
    is_conversation: bool = False
    system: str = ""
    source: str = ""


def questions(values: Mapping[str, Any]) -> Content:
    """Returns the turns of a question with its answers, or of a list of questions with an answer
    each, by the columns of `known_sets.Columns`.

    Also of `values`: `prompt`, asked where there is no column of questions, and `answer_field`.

    Raises:
      Reject: the values do not make questions and answers.
    """
    question = values["question"] if "question" in values else values["prompt"]
    answer = values.get("answer")
    if values.get("answer_field"):
        answer = _field(answer, values["answer_field"])
    elif isinstance(answer, str):
        answer = _answer_of_text(answer, values.get("answer_column", ""))
    if isinstance(question, str) and checks.listed_texts(question):
        question = checks.listed_texts(question)
    if isinstance(question, list):
        return _list_of_questions(values, question, answer)
    text = _with_context(checks.text_of(question, "question"), values.get("context"))
    name = "" if values.get("id") is None else checks.text_of(values["id"], "id")
    if "choices" in values:
        text, answers = _with_choices(text, _list_of(values["choices"], "choices"), answer)
    else:
        answers = _by_frequency(checks.answers_of(answer))
    return Content((Turn(text, answers, name),))


def questions_of_pages(values: Mapping[str, Any]) -> Content:
    """Returns the turns of a question about a document of several pages, as `questions`.

    `evidence` shows whether pages are missing: it has the names of all pages, or the numbers of
    those that answer.

    Raises:
      Reject: as `questions`, or there are fewer pages than there should be.
    """
    # Nothing else shows a page whose cell was lost at the end: it is null, as those beyond it.
    evidence = _list_of(values.get("evidence") or [], "the list of pages")
    has = len(values["images"])
    numbers = [one for one in evidence if isinstance(one, int) and not isinstance(one, bool)]
    if numbers != evidence and len(evidence) != has:
        raise Reject(f"images are missing ({has} for {len(evidence)} names of pages)")
    if numbers and max(numbers) > has:
        raise Reject(f"images are missing ({has}, and page {max(numbers)} has the answer)")
    # Lists of answers are written as the text of one.
    answer = values["answer"]
    if isinstance(answer, str) and answer.strip().startswith("["):
        answer = _list_of(answer, "the answer")
    return questions({**values, "answer": answer})


def pairs(values: Mapping[str, Any]) -> Content:
    """Returns the turns of a list of {user, assistant}, each a question of its own.

    Raises:
      Reject: the list or an entry of it is another.
    """
    texts = _objects(_unspelled(values["texts"]))
    if not isinstance(texts, list):
        raise Reject(f"texts is no list of user and assistant ({type(texts).__name__})")
    for number, text in enumerate(texts):
        if isinstance(text, dict) and text.get("system"):
            raise Reject(f"a text has a system message (text {number})")
        # One text is taught: several would be taken for answers that are all right.
        if isinstance(text, dict) and isinstance(text.get("assistant"), list | dict):
            raise Reject(f"assistant of text {number} is no text")
    return Content(turns.of_pairs(texts), source=_common_source(texts))


def pairs_in_order(values: Mapping[str, Any]) -> Content:
    """Returns the turns of a list of {user, assistant} as a conversation; see `pairs`."""
    content = pairs(values)
    return content._replace(is_conversation=len(content.turns) > 1)


def conversation(values: Mapping[str, Any]) -> Content:
    """Returns the turns of a list of messages, {from, value} or {role, content}.

    Raises:
      Reject: as `turns.of_messages`, or a message names the path of an image.
    """
    messages = _objects(_unspelled(values["texts"]))
    # Of a system message, too, the keys are those of the set.
    first = messages[0] if isinstance(messages, list) and messages else None
    is_llava = isinstance(first, dict) and "from" in first
    keys = ("from", "value") if is_llava else ("role", "content")
    chat = turns.of_messages(messages, *keys)
    if chat.images:
        raise Reject(f"a message names an image beside those of the row ({chat.images[0]:.50})")
    return Content(chat.turns, len(chat.turns) > 1, chat.system)


READERS: dict[str, Callable[[Mapping[str, Any]], Content]] = {
    "questions": questions,
    "questions of pages": questions_of_pages,
    "pairs": pairs,
    "pairs in order": pairs_in_order,
    "conversation": conversation,
}


def _objects(value: Any) -> Any:
    """Returns a list of objects that is stored as an object of lists, as the `datasets` library
    does with a Sequence of several features; anything else as it is."""
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(v, list) for v in value.values())
    ):
        return value
    if len({len(one) for one in value.values()}) != 1:
        raise Reject(f"lists of {', '.join(value)} differ in length")
    return [dict(zip(value, one, strict=True)) for one in zip(*value.values(), strict=True)]


def _unspelled(value: Any) -> Any:
    """Returns the list or object that a text spells; anything else as it is."""
    found = checks.literal(value) if isinstance(value, str) else None
    return found if isinstance(found, list | dict) else value


def _list_of_questions(values: Mapping[str, Any], question: list, answer: Any) -> Content:
    """Returns the turns of a list of questions, with an answer or a list of answers each."""
    if "choices" in values:
        raise Reject("choices beside a list of questions, and nothing says of which")
    if not isinstance(answer, list) or len(answer) != len(question):
        has = len(answer) if isinstance(answer, list) else type(answer).__name__
        raise Reject(f"a list of questions without as many answers ({len(question)}, {has})")
    kind = values.get("kind")
    is_conversation = isinstance(kind, str) and kind.strip().lower() == CONVERSATIONAL
    found = []
    for number, (one, answers) in enumerate(zip(question, answer, strict=True)):
        text = checks.text_of(one, "question")
        # Questions of their own may be asked alone; a conversation begins with its context.
        if not is_conversation or not number:
            text = _with_context(text, values.get("context"))
        found.append(Turn(text, checks.answers_of(answers)))
    return Content(tuple(found), is_conversation and len(found) > 1)


def _with_context(question: str, context: Any) -> str:
    """Returns a question below the text that it is about, if there is any."""
    if context is None or context == "":
        return question
    if not isinstance(context, str):
        raise Reject(f"the context is no text ({type(context).__name__})")
    return f"{context.strip()}\n{question}" if context.strip() else question


def _with_choices(
    question: str, choices: Sequence[Any], answer: Any
) -> tuple[str, tuple[str, ...]]:
    """Returns a question above its choices, lettered, and the choice that answers, and its letter.

    Args:
      question: the question.
      choices: the choices.
      answer: the number of a choice from 0, its letter, or itself; or None for a secret.

    Raises:
      Reject: choices are no texts, or the answer is none of them or may be several.
    """
    texts = [checks.text_of(one, "a choice").strip() for one in choices]
    if not 2 <= len(texts) <= len(LETTERS) or "" in texts:
        raise Reject(f"no choices, one alone, or an empty one ({len(texts)})")
    # Some sets have the letters in their choices: "A. red", "(B) blue".
    if all(re.match(rf"\(?{one}[.):]\s", text) for one, text in zip(LETTERS, texts, strict=False)):
        texts = [re.sub(r"^\(?\w[.):]\s+", "", text) for text in texts]
        if isinstance(answer, str):
            answer = re.sub(r"^\(?[A-Z][.):]\s+", "", answer.strip())
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    # As most benchmarks write them, a choice a line.
    lettered = f"{question}\n{listed}"
    if isinstance(answer, list) and len(answer) == 1:
        [answer] = answer
    if answer is None or answer == []:
        return lettered, ()
    number = _choice(texts, answer)
    return lettered, (texts[number], LETTERS[number])


def _choice(texts: list[str], answer: Any) -> int:
    """Returns the number of the choice that an answer stands for; raises Reject if none does, or
    several might."""
    shown = f"{answer!r:.50} of {len(texts)} choices"
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        meant = {answer}
    elif isinstance(answer, str):
        answer = answer.strip()
        # By all readings: "1" of the choices 1 and 2 may be the number of the second, or the first.
        meant = {number for number, text in enumerate(texts) if text == answer}
        if answer.isdecimal() and len(answer) < 3:
            meant.add(int(answer))
        if len(answer) == 1 and answer in LETTERS:
            meant.add(LETTERS.index(answer))
    else:
        raise Reject(f"the answer is no choice ({shown})")
    meant = {number for number in meant if 0 <= number < len(texts)}
    if len(meant) != 1:
        says = "may stand for several choices" if meant else "is none of the choices"
        raise Reject(f"the answer {says} ({shown})")
    return meant.pop()


def _answer_of_text(text: str, column: str) -> str | list[str]:
    """Returns an answer that a cell has as a text, or the list of answers that the text spells.

    Tables made of other tables have lists as texts. That one in a column of answers is a list is
    clear, and so is that one text in brackets is no answer; several of a single answer may be
    either.

    Raises:
      Reject: it may be one answer or several, or cannot be told apart.
    """
    is_several = column.endswith("s")
    spelled = checks.literal(text) if is_several and text.strip()[:1] in ("[", "{") else None
    if spelled == []:
        return []
    # As SQuAD has them: an object with lists of texts and of their places.
    if isinstance(spelled, dict):
        raise Reject(f"an answer is the text of an object, and no list ({text!r:.50})")
    found = checks.listed_texts(text)
    if len(found) == 1 or (found and is_several):
        return found
    if found or re.match(r"\[\s*['\"].*\]$", text.strip(), re.DOTALL):
        raise Reject(f"an answer is the text of a list, and no list ({text!r:.50})")
    return text


def _field(value: Any, path: str) -> Any:
    """Returns what stands at `path`, as a.b, in a JSON object or the text of one.

    Objects and lists are returned as JSON, as they are to be written.

    Raises:
      Reject: it is no JSON object, or has nothing there.
    """
    if isinstance(value, str):
        parsed = files.parse_json("", value.encode(errors="surrogatepass"))
        if isinstance(parsed, Rejection):
            raise Reject(f"the answer is {parsed.reason}")
        _, value = parsed
    at = ""
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            known = value if isinstance(value, dict) else {}
            raise Reject(
                f"the answer has no {at}{key} (--answer_field={path}{nearest(key, known)})"
            )
        value = value[key]
        if value is None:
            raise Reject(f"the answer is null (--answer_field={path})")
        at += f"{key}."
    # A list, too: within JSON it is no list of answers that are all right.
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return value


def _list_of(value: Any, name: str) -> list:
    """Returns a list, or that of which a text is the JSON or Python's spelling; raises Reject for
    anything else."""
    if isinstance(value, list):
        return value
    found = checks.literal(value) if isinstance(value, str) else None
    if isinstance(found, list):
        return found
    raise Reject(f"{name} is no list ({value!r:.50})")


def _common_source(texts: Sequence[dict[str, Any]]) -> str:
    """Returns the data set that all turns name, "" where they name several, or a document."""
    named = [text.get("source") for text in texts]
    source = named[0] if named and all(one == named[0] for one in named) else None
    # Docmatix names the PDF there.
    return source if isinstance(source, str) and not source.startswith("PDFA key") else ""


def _by_frequency(answers: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the answers with the commonest one first, because training teaches the first.

    TextVQA has the answers of ten people, and its score counts how many of them agree.
    """
    counts = collections.Counter(answers)
    # Stable: answers that are equally common keep the order of the source.
    return tuple(sorted(answers, key=lambda answer: -counts[answer]))
