"""The benchmarks, an entry each: what is asked, of which split, and how answers are scored and handed in. Beside them
held-out texts, of which nothing is asked."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.eval import prompts, scores
from alignvlm_jax.eval.scores.amounts import amount_accuracy
from alignvlm_jax.eval.scores.covered import covered_exact_match, covered_jaccard
from alignvlm_jax.eval.scores.denotation import denotation_accuracy
from alignvlm_jax.eval.scores.facts import fact_accuracy
from alignvlm_jax.eval.scores.fields import field_f1
from alignvlm_jax.eval.scores.relaxed import relaxed_accuracy
from alignvlm_jax.eval.scores.vqa import vqa_accuracy

SCORER_VERSION = "tasks/1"
"""Stands in the header of the predictions on a task: raise it when a score of any answer to any task changes."""

Score = Callable[[str, Sequence[str]], tuple[float, float]]
"""Of a prediction and the accepted answers: what they add to the score's sum and to its weight."""


def each(score: Callable[[str, Sequence[str]], float]) -> Score:
    """Returns the score of which questions have the plain mean."""
    return lambda prediction, answers: (score(prediction, answers), 1.0)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: how it is asked for.
      split: of the shards that are asked.
      scores: by name; the first is the benchmark's own.
      folder: under the folder of all benchmarks, what `prepare` wrote; default: the name.
      prompt: template of `prompts`.
      answer: makes the answer of what the model says.
      max_new_tokens: length of the longest answer in tokens; None: that of the model's config.
      column: of the paper's table that it belongs to, "" for none. Several tasks of a column are averaged.
      submission: the names that the id and the answer have in a file that is handed in.
    """

    name: str
    split: str
    scores: Mapping[str, Score]
    folder: str = ""
    prompt: str = prompts.PLAIN
    answer: Callable[[str], str] = str.strip
    max_new_tokens: int | None = None
    column: str = ""
    submission: tuple[str, str] = ("id", "answer")

    @property
    def main_score(self) -> str:
        """The name of the benchmark's own score."""
        return next(iter(self.scores))

    def rate(self, said: str, answers: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Returns what an answer adds to the sum and the weight of each score: nothing to any sum where it is empty,
        whatever the normaliser of a score makes of that; and nothing at all where no answer is known."""
        if not answers:
            return {}
        answer = self.answer(said)
        rated = {name: score(answer, answers) for name, score in self.scores.items()}
        return rated if answer else {name: (0.0, weight) for name, (_, weight) in rated.items()}


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Held-out text that the LLM, without any image, is to find likely: `eval.texts` measures it.

    Attributes:
      name: how it is asked for.
      split: of the shards that are read.
      folder: under the folder of all benchmarks, what `prepare` wrote; default: the name.
      window: tokens that the LLM sees at once, or the row length of its stage where that is less. Values of different
        windows do not compare: hence not the row length of whichever stage there was, but what real ones have room for.
    """

    name: str
    split: str
    folder: str = ""
    window: int = 512

    score: ClassVar[str] = "bits_per_byte"
    """The name of its one score, of which less is better."""


def _bars(text: str) -> str:
    """Several answers as the denotation accuracy parts them."""
    return text.strip().replace("||", "|")


ANLS = {"anls": each(scores.anls), "exact_match": each(scores.exact_match)}
DENOTATION = {"denotation_accuracy": each(denotation_accuracy), "exact_match": each(scores.exact_match)}
FACT = {"accuracy": each(fact_accuracy), "exact_match": each(scores.exact_match)}
FIELDS = {"f1": field_f1, "exact_match": each(scores.exact_match)}
VQA = {"vqa_accuracy": each(vqa_accuracy), "exact_match": each(scores.exact_match)}
RELAXED = {"relaxed_accuracy": each(relaxed_accuracy), "exact_match": each(scores.exact_match)}
AMOUNT = {"relieved_accuracy": each(amount_accuracy), "exact_match": each(scores.exact_match)}
COVERED = {"exact_match": covered_exact_match, "jaccard": covered_jaccard}

RRC = ("questionId", "answer")
"""Of rrc.cvc.uab.es, which scores the test sets of DocVQA and InfographicVQA."""

EVAL_AI = ("question_id", "answer")

# DocVQA, InfographicVQA and TextVQA on validation, all others on test, as in the paper's table 1. VLMEvalKit, which the
# paper used, has no DeepForm, KLC, WTQ and TabFact: they are scored as their data sets are elsewhere.
_ENTRIES = (
    Task("docvqa", "validation", ANLS, prompt=prompts.SHORT, column="DocVQA", submission=RRC),
    Task("docvqa_test", "test", ANLS, prompt=prompts.SHORT, submission=RRC),
    Task("infovqa", "validation", ANLS, prompt=prompts.SHORT, column="InfoVQA", submission=RRC),
    Task("infovqa_test", "test", ANLS, prompt=prompts.SHORT, submission=RRC),
    Task("deepform", "test", FIELDS, column="DeepForm"),
    Task("klc", "test", FIELDS, column="KLC"),
    Task("wtq", "test", DENOTATION, answer=_bars, column="WTQ"),
    Task("tabfact", "test", FACT, column="TabFact"),
    Task("chartqa", "test", RELAXED, prompt=prompts.SHORT, column="ChartQA"),
    Task("textvqa", "validation", VQA, prompt=prompts.SHORT, column="TextVQA", submission=EVAL_AI),
    Task("textvqa_test", "test", VQA, prompt=prompts.SHORT, submission=EVAL_AI),
    Task("fintabnetqa", "test", AMOUNT, prompt=prompts.TABLE_AMOUNT, column="TableVQA"),
    Task("vtabfact", "test", FACT, prompt=prompts.TABLE_FACT, column="TableVQA"),
    Task("vwtq", "test", DENOTATION, prompt=prompts.TABLE_QUESTION, answer=_bars, column="TableVQA"),
    Task("vwtq_syn", "test", DENOTATION, prompt=prompts.TABLE_QUESTION, answer=_bars, column="TableVQA"),
    Task("vcr_en_easy", "test", COVERED, prompt=prompts.COVERED, max_new_tokens=120),
    Task("vcr_en_hard", "test", COVERED, prompt=prompts.COVERED, max_new_tokens=120),
    Task("debian_tables", "validation", ANLS, folder="debian"),
    Task("seen_fonts", "seen_fonts", ANLS, folder="demo"),
    Task("unseen_fonts", "unseen_fonts", ANLS, folder="demo"),
)
TASKS = {task.name: task for task in _ENTRIES}
TEXTS = {task.name: task for task in (TextTask("text_bpb", "validation", folder="debian"),)}
COLUMNS = tuple(dict.fromkeys(task.column for task in _ENTRIES if task.column))
"""Of the paper's table, in its order."""

GROUPS = {"tablevqa": ("fintabnetqa", "vtabfact", "vwtq", "vwtq_syn")}
"""Names that stand for several tasks."""

NAMES = (*TASKS, *TEXTS, *GROUPS)
"""All that can be asked for."""


def find(names: Iterable[str]) -> list[Task | TextTask]:
    """Returns the tasks of these names, each once.

    Raises:
      UserError: there is no task of a name.
    """
    found = {}
    for name in names:
        for member in GROUPS.get(name, (name,)):
            task = TASKS.get(member) or TEXTS.get(member)
            if task is None:
                raise UserError(f"unknown task {name!r}{nearest(name, NAMES)}")
            found[member] = task
    return list(found.values())
