"""The chat format of a model: what stands around questions and answers; and those of models whose
tokenizers come without a chat template."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError, nearest

STRIPS = {
    "": lambda text: text,
    "strip": str.strip,
    "lstrip": str.lstrip,
    "rstrip": str.rstrip,
    "lstrip_newlines": lambda text: text.lstrip("\n"),
    "strip_newlines": lambda text: text.strip("\n"),
}
"""What a template does to the white space around a text."""


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """What stands around questions and answers: `start IMAGE`, or `start user IMAGE` for the first
    turn, then for each turn `user QUESTION assistant ANSWER end after`. Special tokens stand in
    these strings by their names.

    Attributes:
      start: before the first turn.
      system_before: what stands in the place of `start` where a chat has a system turn, before its
        text; None of formats that have no place for one: it opens the first question then.
      system_after: what follows its text.
      user: before a question.
      assistant: between question and answer.
      end: the special token that ends an answer, which the model has to say.
      after: after the end of an answer.
      stops: special tokens at which generation stops; `end` is one of them.
      image_in_turn: whether images stand inside the first turn, before its question, or before all
        turns.
      question_strip: a name in STRIPS.
      answer_strip: a name in STRIPS.
      before_answer: text that the model has to say before an answer.
      after_answer: text that the model has to say between an answer and its end.
      earlier_assistant: `assistant` of turns before the last, where it is another.
      earlier_strip: `answer_strip` of those turns.
      is_joined: whether text is encoded from one special token to the next, ours together with the
        question's, as transformers does; otherwise each string by itself.
    """

    start: str
    user: str
    assistant: str
    end: str
    after: str = ""
    stops: tuple[str, ...] = ()
    image_in_turn: bool = True
    question_strip: str = ""
    answer_strip: str = ""
    before_answer: str = ""
    after_answer: str = ""
    earlier_assistant: str | None = None
    earlier_strip: str = ""
    is_joined: bool = False
    system_before: str | None = None
    system_after: str = ""

    def begin(self, system: str) -> tuple[str, str]:
        """Returns what stands before the first turn, and before the text of its question, for the
        text of a system turn; "" for a chat without one."""
        if not system:
            return self.start, ""
        if self.system_before is None:
            return self.start, f"{system}\n\n"
        return f"{self.system_before}{system}{self.system_after}", ""

    def around(self, is_last: bool) -> tuple[str, str]:
        """Returns `assistant` and the name of the strip of answers, of the last turn or another."""
        if is_last or self.earlier_assistant is None:
            return self.assistant, self.answer_strip
        return self.earlier_assistant, self.earlier_strip

    def spell(
        self, turns: Sequence[tuple[str, str]], question: str | None = None, system: str = ""
    ) -> str:
        """Returns the text of a conversation without images; with a `question`, which the last
        answer is yet to follow. A system turn needs a format that has a place for it."""
        text, _ = self.begin(system)
        for number, (question_of_turn, answer) in enumerate(turns):
            is_last = question is None and number == len(turns) - 1
            assistant, strip = self.around(is_last)
            text += self.user + STRIPS[self.question_strip](question_of_turn) + assistant
            text += self.before_answer + STRIPS[strip](answer) + self.after_answer
            text += self.end + self.after
        if question is not None:
            text += self.user + STRIPS[self.question_strip](question) + self.assistant
        return text


def to_json(chat_format: ChatFormat) -> str:
    """Returns a format as a chat_format.json holds it."""
    fields = dataclasses.asdict(chat_format)
    if chat_format.system_before is None:
        # Checksums of formats of before, which had no such fields, stay what they are.
        del fields["system_before"]
        del fields["system_after"]
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def from_json(name: str, text: str) -> ChatFormat:
    """Returns the format that a chat_format.json holds.

    Args:
      name: of the file, for messages.

    Raises:
      UserError: it is damaged, or names a field that there is not.
    """
    known = {field.name for field in dataclasses.fields(ChatFormat)}
    try:
        fields = dict(json.loads(text))
        for field, value in fields.items():
            if field not in known:
                raise UserError(f"{name}: unknown field {field!r}{nearest(field, known)}")
            _check_value(name, field, value)
        # Without the end of an answer among the stops, no answer would end.
        stops = dict.fromkeys((*fields.get("stops", ()), fields.get("end", "")))
        chat_format = ChatFormat(**fields | {"stops": tuple(stops)})
    except (ValueError, TypeError) as err:
        raise UserError(f"{name} is no chat format: {err}") from err
    if chat_format.is_joined and not chat_format.image_in_turn:
        raise UserError(
            f"{name}: with is_joined, images stand in a turn: image_in_turn must be true"
        )
    return chat_format


def to_template(chat_format: ChatFormat) -> str:
    """Returns a chat template in Jinja that writes what `ChatFormat.spell` does, for tools that
    know templates alone; it has no place for images."""
    quoted = functools.partial(json.dumps, ensure_ascii=False)
    calls = {
        name: f".{name.partition('_')[0]}({quoted(newline) if newline else ''})" if name else ""
        for name, newline in ((name, "\n" if "newlines" in name else "") for name in STRIPS)
    }

    # Jinja's literals are JSON's, but for escapes of characters beyond 16 bits: they stand as
    # themselves.
    def answer(is_last: bool) -> str:
        assistant, strip = chat_format.around(is_last)
        text = f"message['content']{calls[strip]}"
        before = quoted(assistant + chat_format.before_answer)
        after = quoted(chat_format.after_answer + chat_format.end + chat_format.after)
        return f"{{{{- {before} ~ {text} ~ {after} -}}}}"

    begin = quoted(chat_format.start)
    # Without a place of its own a system turn opens the first question.
    told = "((told ~ '\\n\\n') if told and loop.first else '')"
    if chat_format.system_before is not None:
        system = f"{quoted(chat_format.system_before)} ~ told ~ {quoted(chat_format.system_after)}"
        begin = f"({system}) if told else {begin}"
        told = "''"
    question = f"message['content']{calls[chat_format.question_strip]}"
    return "\n".join(
        [
            "{%- if messages[0]['role'] == 'system' -%}",
            "{%- set told = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
            "{%- else -%}",
            "{%- set told = '' -%}{%- set turns = messages -%}",
            "{%- endif -%}",
            f"{{{{- {begin} -}}}}",
            "{%- for message in turns -%}",
            "{%- if message['role'] == 'user' -%}",
            f"{{{{- {quoted(chat_format.user)} ~ {told} ~ {question} -}}}}",
            "{%- elif loop.last -%}",
            answer(True),
            "{%- else -%}",
            answer(False),
            "{%- endif -%}",
            "{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {quoted(chat_format.assistant)} -}}}}"
            "{%- endif -%}",
            "",
        ]
    )


def _check_value(name: str, field: str, value: Any) -> None:
    kind = {"stops": list, "image_in_turn": bool, "is_joined": bool}.get(field, str)
    is_absent = field in ("earlier_assistant", "system_before") and value is None
    if not isinstance(value, kind) and not is_absent:
        raise UserError(f"{name}: {field} is {value!r}; it must be of type {kind.__name__}")
    if field.endswith("strip") and value not in STRIPS:
        raise UserError(f"{name}: {field} is {value!r}{nearest(value, STRIPS)}")


# "<user>" or "<|im_end|>": no space and no bracket within.
MARK = r"<[^<> ]+>"

CHATML = ChatFormat(
    start="",
    user="<|im_start|>user\n",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    stops=("<|im_end|>", "<|endoftext|>"),
    system_before="<|im_start|>system\n",
    system_after="<|im_end|>\n",
)
FAMILIES = {
    "marks": ChatFormat(
        start="<s>",
        user="<user>",
        assistant="<assistant>",
        end="<end>",
        stops=("<end>",),
        image_in_turn=False,
    ),
    "llama3": ChatFormat(
        start="<|begin_of_text|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        stops=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        system_before="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
        system_after="<|eot_id|>",
        question_strip="strip",
        answer_strip="strip",
    ),
    # With the system prompt that the template of SmolLM2 puts where a conversation has none.
    "smollm": ChatFormat(
        start="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n",
        user=CHATML.user,
        assistant=CHATML.assistant,
        end=CHATML.end,
        after=CHATML.after,
        stops=CHATML.stops,
        system_before=CHATML.system_before,
        system_after=CHATML.system_after,
    ),
    "chatml": CHATML,
    # Without the template's spaces: its tokenizers put one before every stretch of text. A system
    # turn stands inside the first question, as in the template, whose marks of one are plain text.
    "llama2": ChatFormat(
        start="<s>",
        user="[INST]",
        assistant="[/INST]",
        end="</s>",
        stops=("</s>",),
        question_strip="strip",
        answer_strip="strip",
    ),
}
"""The formats of tokenizers that come without a chat template, by the special tokens that they
need; the first that fits is taken."""
OWN = {"smollm": {"<repo_name>", "<gh_stars>", "<jupyter_start>"}}
"""Special tokens by which a family's own tokenizer is told from others with its chat marks."""


def of_special_tokens(tokenizer: Tokenizer, *, is_from_before: bool) -> ChatFormat | None:
    """Returns the first of FAMILIES whose special tokens a tokenizer has; None where there is none.

    Args:
      is_from_before: as before there were chat_format.json files, when all of ChatML had SmolLM's
        system prompt. What was counted and trained so stays so.
    """
    for name, family in FAMILIES.items():
        own = set() if is_from_before else OWN.get(name, set())
        if required_tokens(family) | own <= tokenizer.special_tokens.keys():
            return family
    return None


def required_tokens(chat_format: ChatFormat) -> set[str]:
    """Returns the special tokens that a format of FAMILIES cannot do without."""
    ours = chat_format.start + chat_format.user + chat_format.assistant
    return {*re.findall(MARK, ours), chat_format.end}
