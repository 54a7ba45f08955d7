"""What a benchmark declares: its data, its prompt, its scores, and how answers are handed in."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

PLAIN = "{question}"
"""Prompt template of DocDownstream, which models of this kind are trained on."""

Added = tuple[float, float]
"""What a question adds to the sum and to the weight of a score."""

Score = Callable[..., Added | Mapping[str, Added]]
"""A function of a prediction and the accepted answers, and of the question and its kind where the
task says so. Returns what the question adds; by part for a score of several parts, whose value is
the mean over them."""

LEFT_OUT = "left_out"
"""The name of the score that is the fraction of tests or questions that no other score counts."""


def each(score: Callable[[str, Sequence[str]], float]) -> Score:
    """Returns a Score that is the plain mean of `score` over questions: each has a weight of 1."""
    return lambda prediction, answers: (score(prediction, answers), 1.0)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: its name on the command line.
      split: name of the split of its data.
      scores: its scores by name; the first is the main score, which the benchmark publishes.
      folder: folder that `prepare` wrote, within the folder of all benchmarks; default: the name.
      prompt: template of the prompt, with `{question}` in it.
      answer: turns what the model generates into the answer.
      max_new_tokens: length of the longest answer in tokens; None takes that of the model's config.
      column: column of the paper's table 1 that it belongs to, "" for none. Several tasks of a
        column are averaged.
      submission: the keys of the id and of the answer in a file that is submitted.
      rates_silence: whether an empty prediction is scored as others are, and not as wrong.
      sees_question: whether its scores are also given the question and its kind, the source of its
        record.
      leaves_out: what the score `LEFT_OUT` counts, and why; "" where there is none.
    """

    name: str
    split: str
    scores: Mapping[str, Score]
    folder: str = ""
    prompt: str = PLAIN
    answer: Callable[[str], str] = str.strip
    max_new_tokens: int | None = None
    column: str = ""
    submission: tuple[str, str] = ("id", "answer")
    rates_silence: bool = False
    sees_question: bool = False
    leaves_out: str = ""

    @property
    def main_score(self) -> str:
        """The name of the score that the benchmark publishes."""
        return next(iter(self.scores))

    def rate(
        self, prediction: str | None, answers: Sequence[str], question: str = "", kind: str = ""
    ) -> dict[str, Added]:
        """Returns what a prediction adds to the sum and the weight of each score, by its name or
        `NAME/PART`.

        An empty prediction adds 0 to the sums of all scores but `LEFT_OUT`, unless `rates_silence`.
        The result is empty if no answer is known.

        Args:
          prediction: what the model says; None where it could not be asked, which is always wrong.
          answers: the accepted answers.
          question: the text of the question.
          kind: the source of its record.

        Raises:
          UserError or ValueError: the answers, or the kind of the question, are none of the task's.
        """
        if not answers:
            return {}
        answer = self.answer(prediction or "")
        # Most scores need no more than the answers, and are also used without a task.
        about = (question, kind) if self.sees_question else ()
        rated: dict[str, Added] = {}
        for name, score in self.scores.items():
            added = score(answer, answers, *about)
            rated |= (
                {f"{name}/{part}": one for part, one in added.items()}
                if isinstance(added, Mapping)
                else {name: added}
            )
        if answer or (self.rates_silence and prediction is not None):
            return rated
        # Some normalisers make an empty text of an answer ("the"), which an empty prediction would
        # equal.
        return {
            name: (total if name == LEFT_OUT else 0.0, weight)
            for name, (total, weight) in rated.items()
        }
