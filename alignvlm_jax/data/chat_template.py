"""The chat format of a tokenizer's model, out of its own chat template where it has one: that is
rendered with marks in the place of questions and answers, and split at them."""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignvlm_jax.data.chat_format import (
    FAMILIES,
    STRIPS,
    ChatFormat,
    from_json,
    of_special_tokens,
    required_tokens,
    to_json,
)
from alignvlm_jax.data.tokenizers.base import ChatFiles, Tokenizer
from alignvlm_jax.errors import UserError

Message = dict[str, str]

# Of the private use area: no template looks at them, and none writes them itself.
QUESTION = "\ue000"
ANSWER = "\ue001"
DATE = datetime.date(2024, 7, 26)
"""What templates that write the date are told: a prompt must not differ from one day to the next.
It is what Llama 3.2's own writes where it is told none."""
TEXT_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|endoftext|>", "</s>")
"""Special tokens that end any text: generation stops at them as well."""
PADDED = "\n \t{} \t\n"

CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("What is the total?", "318.40"),),
    (("What is the total?", "318.40"), ("Who pays?", "Dr. Strange"), ("When?", "12 May")),
    (("  Who?\n ", "\n Nobody \t"), ("\n\nWhy? ", "\n\nIt says so. \n")),
    (("Été à Zürich, 東京?", "naïve 👩‍💻"),),
    (("Is <b>it</b> [bold] {{ x }}?", "<|yes|> {% if %} [INST] </b>"), ("<s>", "<br/>")),
)
"""A format must spell these as its template does."""


@functools.lru_cache(maxsize=8)
def format_of(tokenizer: Tokenizer) -> ChatFormat:
    """Returns the format of a tokenizer's model: that of the chat_format.json beside it, else that
    of its chat template, else that of the family whose special tokens it has.

    Raises:
      UserError: there is none, or the template is none of a ChatFormat.
    """
    files = tokenizer.chat_files
    if files.chat_format:
        return _checked(tokenizer, from_json(files.name, files.chat_format))
    if files.template:
        return _checked(tokenizer, read(files, tokenizer.special_tokens))
    found = of_special_tokens(tokenizer, is_from_before=files.is_from_before)
    if found is not None:
        return found
    needed = "; ".join(
        f"{name}: {' '.join(sorted(required_tokens(family)))}" for name, family in FAMILIES.items()
    )
    raise UserError(
        f"tokenizer {tokenizer.name} has the special tokens of no chat format that is known "
        f"({needed}), and no chat template beside it"
    )


def format_file(tokenizer: Tokenizer) -> str:
    """Returns the chat_format.json that must stand beside a tokenizer where its folder is one of
    ours; empty where its special tokens alone have always said the same.

    Raises:
      UserError: as `format_of`.
    """
    chat_format = format_of(tokenizer)
    family = of_special_tokens(tokenizer, is_from_before=True)
    # A file that was written before formats had a place for a system turn says the same.
    if family and chat_format.system_before is None:
        family = dataclasses.replace(family, system_before=None, system_after="")
    return "" if chat_format == family else to_json(chat_format)


def told_apart_by(tokenizer: Tokenizer) -> str:
    """Returns what of a chat format tells one tokenizer from another, for checksums: `format_file`
    without the place of a system turn.

    Formats of before had none, and no record a system turn: what was counted by them stays counted.

    Raises:
      UserError: as `format_of`.
    """
    text = format_file(tokenizer)
    if not text:
        return ""
    return to_json(dataclasses.replace(format_of(tokenizer), system_before=None, system_after=""))


def _checked(tokenizer: Tokenizer, chat_format: ChatFormat) -> ChatFormat:
    if chat_format.end not in tokenizer.special_tokens:
        raise UserError(
            f"{tokenizer.chat_files.name}: an answer ends by {chat_format.end!r}, which is no "
            f"special token of tokenizer {tokenizer.name}"
        )
    return chat_format


def read(files: ChatFiles, special_tokens: Collection[str]) -> ChatFormat:
    """Returns the format of a chat template; images stand before the question of the first turn.

    Args:
      files: with a template.
      special_tokens: names of the tokenizer's special tokens.

    Raises:
      UserError: the template cannot be rendered, or what it writes is no ChatFormat, and where it
        differs.
    """
    template = Template(files)
    chat_format = _split(template, special_tokens)
    for turns in CONVERSATIONS:
        messages = _messages(turns)
        question = turns[0][0]
        prompt = [*messages, {"role": "user", "content": question}]
        _compare(files, chat_format.spell(turns), template.render(messages, False))
        _compare(files, chat_format.spell(turns, question), template.render(prompt, True))
        _compare(files, chat_format.spell((), question), template.render(prompt[-1:], True))
    return _with_system(template, chat_format)


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark what the model says: what stands in it."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template:
    """A chat template, rendered as transformers renders it: in a sandbox, and on a fixed date."""

    def __init__(self, files: ChatFiles):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        # Jinja's own escapes characters of HTML.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = DATE.strftime
        self.files = files
        try:
            self._template = environment.from_string(files.template)
        except jinja2.TemplateError as err:
            raise self._error(err) from err

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Returns the text of a conversation.

        Raises:
          UserError: the template fails on it.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                # An answer about a page comes without a chain of thought before it.
                enable_thinking=False,
                **dict(self.files.named_tokens),
            )
        except Exception as err:  # A template can do anything, and fail by anything.
            raise self._error(err) from err

    def _error(self, err: Exception) -> UserError:
        reason = " ".join(str(err).split())
        return UserError(f"{self.files.name}: its chat template cannot be rendered ({reason})")


def _rendered(template: Template, messages: Sequence[Message]) -> str:
    """The text of a prompt; "" where the template refuses it."""
    try:
        return template.render(messages, True)
    except UserError:
        return ""


def _with_system(template: Template, chat_format: ChatFormat) -> ChatFormat:
    """A format with the place that the template has for a system turn, where it has one before the
    first turn; others refuse it, or write it into a question, which is no matter of the format."""
    user = {"role": "user", "content": QUESTION}
    told = {"role": "system", "content": ANSWER}
    try:
        found = template.render([told, user], True)
        # A template that knows users and others takes who speaks here for the one who answers.
        if found == _rendered(template, [told | {"role": "assistant"}, user]):
            return chat_format
        before, mark, rest = found.partition(ANSWER)
        after, is_there, _ = rest.partition(f"{chat_format.user}{QUESTION}")
        if not mark or not is_there:
            return chat_format
        made = dataclasses.replace(chat_format, system_before=before, system_after=after)
        for turns in CONVERSATIONS:
            messages = [{"role": "system", "content": "Read."}, *_messages(turns)]
            if made.spell(turns, system="Read.") != template.render(messages, False):
                return chat_format
    except UserError:
        return chat_format
    return made


class _Texts(NamedTuple):
    """What a template writes around a question and an answer."""

    head: str  # Before the first question.
    assistant: str  # From a question to the end of a prompt.
    middle: str  # From a question to its answer, of the last turn.
    earlier: str  # From a question to its answer, of another turn.
    tail: str  # After the last answer.
    between: str  # From an answer to the next question.


def _around(
    template: Template, turns: Sequence[tuple[str, str]], question: str | None = None
) -> list[str]:
    """The texts before, between and after the marks."""
    messages = _messages(turns)
    if question is not None:
        messages.append({"role": "user", "content": question})
    return re.split(f"[{QUESTION}{ANSWER}]", template.render(messages, question is not None))


def _texts(template: Template) -> _Texts:
    files = template.files
    prompt = _around(template, (), QUESTION)
    one = _around(template, [(QUESTION, ANSWER)])
    two = _around(template, [(QUESTION, ANSWER)] * 2)
    # A prompt has one mark, and so two texts around it; a turn has two marks, two turns have four.
    if (len(prompt), len(one), len(two)) != (2, 3, 5):
        _refuse(files, "a question or an answer does not stand in it once as it is")
    head, assistant = prompt
    _, middle, tail = one
    if one[0] != head or two[0] != head or two[4] != tail or two[3] != middle:
        _refuse(files, f"one turn begins {one[0]!r}, two begin {two[0]!r}, a prompt {head!r}")
    if not middle.startswith(assistant):
        _refuse(files, f"a prompt ends {assistant!r}, and before an answer stands {middle!r}")
    if not two[2].startswith(tail):
        _refuse(files, f"the last answer is followed by {tail!r}, an earlier one by {two[2]!r}")
    return _Texts(head, assistant, middle, two[1], tail, two[2])


def _split(template: Template, special_tokens: Collection[str]) -> ChatFormat:
    files = template.files
    head, assistant, middle, earlier, tail, between = _texts(template)
    before_answer = middle.removeprefix(assistant)
    if not earlier.endswith(before_answer):
        _refuse(files, f"before the last answer stands {middle!r}, before others {earlier!r}")
    user = between.removeprefix(tail)
    if not head.endswith(user):
        _refuse(files, f"the first turn opens {head!r}, another {user!r}")
    # The longest first: of alternatives the first that matches is taken, and one may begin another.
    names = sorted(special_tokens, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)), tail) if names else None
    if found is None:
        _refuse(files, f"no special token ends an answer, but {tail!r}")
    earlier_assistant = earlier.removesuffix(before_answer)
    end = found.group()
    padded = QUESTION, PADDED.format(ANSWER)
    stops = (end, dict(files.named_tokens).get("eos_token", end), *TEXT_ENDS)
    return ChatFormat(
        start=head.removesuffix(user),
        user=user,
        assistant=assistant,
        end=end,
        after=tail[found.end() :],
        stops=tuple(stop for stop in dict.fromkeys(stops) if stop in special_tokens),
        question_strip=_strip(
            files, _around(template, (), PADDED.format(QUESTION)), head, assistant
        ),
        answer_strip=_strip(files, _around(template, [padded])[1:], middle, tail),
        before_answer=before_answer,
        after_answer=tail[: found.start()],
        earlier_assistant=None if earlier_assistant == assistant else earlier_assistant,
        earlier_strip=_strip(
            files, _around(template, [padded, (QUESTION, ANSWER)])[1:3], earlier, between
        ),
        is_joined=True,
    )


def _strip(files: ChatFiles, found: list[str], before: str, after: str) -> str:
    """The name of what was done to the white space of PADDED, which stands in `found` beside the
    mark, beyond what stands there without it."""
    left, right = PADDED.split("{}")
    for name, strip in STRIPS.items():
        kept = strip(f"{left}{QUESTION}{right}").partition(QUESTION)
        if found == [before + kept[0], kept[2] + after]:
            return name
    _refuse(files, f"white space around a text becomes {found[0][len(before):]!r} before it and "
                   f"{found[-1]!r} after it")  # fmt: skip


def _compare(files: ChatFiles, ours: str, theirs: str) -> None:
    if ours == theirs:
        return
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    after = theirs[max(0, same - 20) : same]
    there = f"{theirs[same : same + 40]!r} after {after!r}"
    _refuse(files, f"it has {there}, where by its first turns would stand {ours[same:][:40]!r}")


def _refuse(files: ChatFiles, reason: str) -> NoReturn:
    raise UserError(
        f"{files.name}: its chat template is no sequence of like turns: {reason}; write a "
        "chat_format.json beside it"
    )


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)
