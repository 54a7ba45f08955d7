"""The registry of benchmarks, with an entry for each, and of held-out texts.

An entry says which split a benchmark uses, how it prompts, and how answers are scored and
submitted. A benchmark with scores of its own has its entry beside them, and a line here.
"""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from alignvlm_jax.benchmarks import scores
from alignvlm_jax.benchmarks.scores import ocrbench_v2, olmocr
from alignvlm_jax.benchmarks.scores.denotation import denotation_accuracy
from alignvlm_jax.benchmarks.scores.numbers import amount_accuracy, relaxed_accuracy
from alignvlm_jax.benchmarks.scores.task import Task, each
from alignvlm_jax.benchmarks.scores.text import (
    covered_exact_match,
    covered_jaccard,
    fact_accuracy,
    field_f1,
)
from alignvlm_jax.benchmarks.scores.vqa import vqa_accuracy
from alignvlm_jax.errors import UserError, nearest

# The prompts keep the wording of the benchmarks' own code with its errors: another wording moves
# scores.
SHORT = "{question}\nAnswer the question using a single word or phrase."

# Its question is the same for every image.
COVERED_PROMPT = (
    "What is the covered texts in the image? Please restore the covered texts "
    "without outputting the explanations."
)

TABLE_QUESTION = (
    "You are asked to answer questions asked on an image.\n"
    "You should answer the question with a single word.\n"
    "Example: \n"
    "Question: what was the only year mr. wu competed in the olympic games?\n"
    "Answer: 2004\n"
    "Question: which township in pope county, arkansas has the least amount of water area?\n"
    "Answer: Freeman\n"
    "If you have multiple answers, please separate them with || marks. Example: "
    "Apple||Banana||Tomato\n\n"
    "Question: {question}\n"
    "Answer:"
)

TABLE_FACT = (
    "You are asked to answer whether the statement is True or False based on given image\n"
    "You should only answer True or False.\n"
    "Example: \n"
    "Statement: the milwaukee buck win 6 game in the 2010 - 11 season\n"
    "Answer: True\n"
    "Statement: only the top team score above the average of 8.8\n"
    "Answer: False\n\n"
    "Statement: {question}\n"
    "Answer:"
)

TABLE_AMOUNT = (
    "You are asked to answer questions asked on a image.\n"
    "You should answer the question within a single word or few words.\n"
    "If units can be known, the answer should include units such as $, %, million and etc.\n"
    "Example: \n"
    "Question: What were the total financing originations for the fiscal year ended October 31, "
    "2004?\n"
    "Answer: $3,852 million\n"
    "Question: What is the time period represented in the table?\n"
    "Answer: October 31\n"
    "Question: What was the percentage of net sales for selling, general and administrative "
    "expenses in 2006?\n"
    "Answer: 34.2%\n"
    "Question: {question}\n"
    "Answer:"
)

SCORER_VERSION = "tasks/1"
"""Version of all scores of tasks, which stands in the header of the predictions on a task.

Raise it when the score of any answer to any task changes.
"""


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Held-out texts whose bits per byte under the LLM, without any image, `text_bpb` measures.

    Attributes:
      name: its name on the command line.
      split: name of the split of its data.
      folder: folder that `prepare` wrote, within the folder of all benchmarks; default: the name.
      window: number of tokens that the LLM sees at once, or if that is less the longest sequence
        that its stage or its published weights were trained on. Values of different windows do not
        compare, so it is a constant that real models have room for.
    """

    name: str
    split: str
    folder: str = ""
    window: int = 512

    score: ClassVar[str] = "bits_per_byte"
    """The name of its only score; lower is better."""


def _bars(text: str) -> str:
    """Returns an answer with its values separated as `denotation_accuracy` expects."""
    return text.strip().replace("||", "|")


ANLS = {"anls": each(scores.anls), "exact_match": each(scores.exact_match)}
DENOTATION = {
    "denotation_accuracy": each(denotation_accuracy),
    "exact_match": each(scores.exact_match),
}
FACT = {"accuracy": each(fact_accuracy), "exact_match": each(scores.exact_match)}
FIELDS = {"f1": field_f1, "exact_match": each(scores.exact_match)}
VQA = {"vqa_accuracy": each(vqa_accuracy), "exact_match": each(scores.exact_match)}
RELAXED = {"relaxed_accuracy": each(relaxed_accuracy), "exact_match": each(scores.exact_match)}
AMOUNT = {"relieved_accuracy": each(amount_accuracy), "exact_match": each(scores.exact_match)}
COVERED = {"exact_match": covered_exact_match, "jaccard": covered_jaccard}

RRC = ("questionId", "answer")
"""Keys of a submission to rrc.cvc.uab.es, which scores the test sets of DocVQA and InfographicVQA.
"""

EVAL_AI = ("question_id", "answer")

# DocVQA, InfographicVQA and TextVQA on validation, all others on test, as in the paper's table 1.
# VLMEvalKit, which the paper used, has no DeepForm, KLC, WTQ and TabFact: they are scored as their
# data sets are elsewhere.
_ENTRIES = (
    Task("docvqa", "validation", ANLS, prompt=SHORT, column="DocVQA", submission=RRC),
    Task("docvqa_test", "test", ANLS, prompt=SHORT, submission=RRC),
    Task("infovqa", "validation", ANLS, prompt=SHORT, column="InfoVQA", submission=RRC),
    Task("infovqa_test", "test", ANLS, prompt=SHORT, submission=RRC),
    Task("deepform", "test", FIELDS, column="DeepForm"),
    Task("klc", "test", FIELDS, column="KLC"),
    Task("wtq", "test", DENOTATION, answer=_bars, column="WTQ"),
    Task("tabfact", "test", FACT, column="TabFact"),
    Task("chartqa", "test", RELAXED, prompt=SHORT, column="ChartQA"),
    Task("textvqa", "validation", VQA, prompt=SHORT, column="TextVQA", submission=EVAL_AI),
    Task("textvqa_test", "test", VQA, prompt=SHORT, submission=EVAL_AI),
    Task("fintabnetqa", "test", AMOUNT, prompt=TABLE_AMOUNT, column="TableVQA"),
    Task("vtabfact", "test", FACT, prompt=TABLE_FACT, column="TableVQA"),
    Task("vwtq", "test", DENOTATION, prompt=TABLE_QUESTION, answer=_bars, column="TableVQA"),
    Task("vwtq_syn", "test", DENOTATION, prompt=TABLE_QUESTION, answer=_bars, column="TableVQA"),
    Task("vcr_en_easy", "test", COVERED, prompt=COVERED_PROMPT, max_new_tokens=120),
    Task("vcr_en_hard", "test", COVERED, prompt=COVERED_PROMPT, max_new_tokens=120),
    olmocr.TASK,
    ocrbench_v2.TASK,
    Task("debian_tables", "validation", ANLS, folder="debian"),
    Task("seen_fonts", "seen_fonts", ANLS, folder="demo"),
    Task("unseen_layouts", "unseen_layouts", ANLS, folder="demo"),
    Task("unseen_fonts", "unseen_fonts", ANLS, folder="demo"),
    Task("unseen_fonts_and_layouts", "unseen_fonts_and_layouts", ANLS, folder="demo"),
)
TASKS = {task.name: task for task in _ENTRIES}
# Of pages that no record of `make data`'s, or of `make reader`'s, trains on.
_TEXTS = (
    TextTask("text_bpb", "validation", folder="debian"),
    TextTask("text_bpb_manuals", "unseen", folder="manuals-unseen"),
)
TEXTS = {task.name: task for task in _TEXTS}
# The first of each column, in order, which a set would not keep.
COLUMNS = tuple(dict.fromkeys(task.column for task in _ENTRIES if task.column))
"""Columns of the paper's table 1, in its order."""

GROUPS = {"tablevqa": ("fintabnetqa", "vtabfact", "vwtq", "vwtq_syn")}
"""Names that stand for several tasks."""

NAMES = (*TASKS, *TEXTS, *GROUPS)
"""All names that the command line takes."""


def find(names: Iterable[str]) -> list[Task | TextTask]:
    """Returns the tasks that some names of tasks or groups stand for, each once.

    Raises:
      UserError: there is no task of a name.
    """
    found = {}
    for name in names:
        for member in GROUPS.get(name, (name,)):
            task = TASKS.get(member) or TEXTS.get(member)
            if task is None:
                raise UserError(f"unknown task {name!r}{nearest(name, NAMES)}")
            # By name: a task that stands in a group and by itself comes once.
            found[member] = task
    return list(found.values())
