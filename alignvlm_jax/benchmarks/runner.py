"""Asks a model the questions of a benchmark, or of a split, there on blank pages too, and writes
down what it says."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from alignvlm_jax.benchmarks import predictions, scores, tasks
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.benchmarks.questions import Benchmark, Question, choose_questions
from alignvlm_jax.config import EvalConfig
from alignvlm_jax.data import chat, images, prepared, shards
from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.tiling import KeptPatches
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import batching, loading
from alignvlm_jax.inference.batching import Answer, Prompts
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.parallel import distributed

PROMPT_MULTIPLE = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Trial:
    """A way to ask the questions of a split.

    Attributes:
      path: of its predictions.
      header: what was done to the model or to what it sees.
      page: of a record, the one that is shown in its place.
      inputs: of a question, arrays that join its prompt.
      variables: join the parameters.
      keep: which patches of a page have image tokens; by default as the config says.
    """

    path: Path
    header: Mapping[str, Any]
    page: Callable[[Record], Record] = lambda record: record
    inputs: Callable[[Question], PackedSequence] = lambda question: {}
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep: KeptPatches | None = None


class Runner:
    """Evaluates one model."""

    def __init__(self, loaded: Loaded, evaluation: EvalConfig | None = None):
        """`evaluation` is by default that of the model's own config."""
        self._loaded = loaded
        self._evaluation = evaluation or loaded.config.eval
        self._sampler = loaded.sampler()
        most = self._evaluation.batch_size
        self._batch_size = batching.batch_size(most, most, loaded.data_parallel_size)

    def evaluate(self, split: str, blind: bool) -> Predictions:
        """Returns the predictions on a split, and leaves them in the workdir; questions already
        answered by this very checkpoint, in this very way, are not asked again.

        Raises:
          UserError: the split is missing or has no questions, or a question does not fit
            `data.seq_len`.
        """
        path = predictions.path_of(loading.workdir_of(self._loaded.path), split, blind)
        name = f"{split}, blank pages" if blind else split
        trial = Trial(path, {"blind": blind})
        return self.evaluate_trial(
            split, dataclasses.replace(trial, page=blank) if blind else trial, name
        )

    def evaluate_trial(self, split: str, trial: Trial, name: str) -> Predictions:
        """Returns the predictions on a split, as `evaluate` does, asked in any way; `name` is shown
        meanwhile."""
        directory = self._loaded.config.data.dir
        max_new_tokens = self._evaluation.max_new_tokens
        records = shards.RecordSource(directory, split)
        questions = choose_questions(records, self._evaluation.num_questions)
        if not questions:
            raise UserError(f"split {split!r} in {directory} has no questions with an answer")
        what = {"scorer_version": scores.SCORER_VERSION, "split": split, **trial.header}
        header = self._header(directory, questions, "QUESTION", max_new_tokens, what)
        builder = dataclasses.replace(self._builder_of(questions), keep=trial.keep)
        return self._predict(
            trial.path,
            header,
            name,
            questions,
            lambda rest: self._answer(records, rest, trial, builder),
        )

    def evaluate_task(self, benchmark: Benchmark) -> Predictions:
        """Returns the predictions on a benchmark, as `evaluate` does on a split.

        A question that makes no prompt, for its image is damaged or its prompt too long, has an
        empty prediction and a `problem` in its row.

        Raises:
          UserError: no question can be asked.
        """
        task = benchmark.task
        questions = benchmark.questions
        max_new_tokens = task.max_new_tokens or self._evaluation.max_new_tokens
        what = {"scorer_version": tasks.SCORER_VERSION, "task": task.name, "split": task.split}
        prompt = task.prompt.format(question="QUESTION")
        header = self._header(benchmark.directory, questions, prompt, max_new_tokens, what)
        path = predictions.task_path(loading.workdir_of(self._loaded.path), task.name)
        builder = self._builder_of(questions, task.prompt)
        result = self._predict(
            path,
            header,
            task.name,
            questions,
            lambda rest: self._answer_task(benchmark, rest, max_new_tokens, builder),
        )
        if len(problems := result.problems()) == len(result.rows):
            if distributed.is_main():
                # Else the file would count as finished, and the next evaluation would ask nothing.
                path.unlink()
            raise UserError(f"task {task.name}: no question can be asked; the first: {problems[0]}")
        return result

    def _predict(
        self,
        path: Path,
        header: dict[str, Any],
        name: str,
        questions: Sequence[Question],
        answer: Callable[[Sequence[Question]], Iterator[dict[str, Any]]],
    ) -> Predictions:
        """The rows that `answer` gives, one after another, for the questions that are left, as
        `collect` has them."""

        def rows(done: int) -> Iterator[list[dict[str, Any]]]:
            # One at a time: a stop loses only those that are in the making.
            for row in answer(questions[done:]):
                yield [row]

        return predictions.collect(
            path, header, rows, name=name, count=len(questions), things="questions"
        )

    def _builder_of(
        self, questions: Sequence[Question], prompt: str = "{question}"
    ) -> ExampleBuilder:
        """The builder of prompts that have room for the longest of some questions. A packed
        sequence has room for many records: with a cache of its length, a prompt would cost as much
        as all."""
        builder = self._loaded.builder
        data = builder.data
        num_image_tokens = data.tiles_of_a_record * builder.tokens_per_prompt_tile
        # With its image: texts about one may be spelled, and are longer then.
        longest = max(
            len(
                builder.prompt_tokens(
                    ChatTurn(prompt.format(question=text), ""), *told, num_image_tokens
                )
            )
            for text, *told in {
                (question.turn.question, question.before, question.system) for question in questions
            }
        )
        # Rounded up: splits whose longest prompts are nearly alike share compiled programs.
        length = min(-(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, data.seq_len)
        return dataclasses.replace(builder, data=dataclasses.replace(data, seq_len=length))

    def _answer(
        self,
        records: Sequence[Record],
        questions: Sequence[Question],
        trial: Trial,
        builder: ExampleBuilder,
    ) -> Iterator[dict[str, Any]]:
        def build(number: int) -> PackedSequence:
            question = questions[number]
            page = trial.page(records[question.record])
            prompt = builder.prompt(page, question.chat_turn(), question.before)
            return prompt | trial.inputs(question)

        answers = self._generate(
            builder, build, questions, self._evaluation.max_new_tokens, trial.variables
        )
        for question, answer in zip(questions, answers, strict=True):
            answered = question.turn.answers
            yield _row(question, answer) | {
                "score": scores.anls(answer.text, answered),
                "exact": scores.exact_match(answer.text, answered),
            }

    def _answer_task(
        self,
        benchmark: Benchmark,
        questions: Sequence[Question],
        max_new_tokens: int,
        builder: ExampleBuilder,
    ) -> Iterator[dict[str, Any]]:
        def build(number: int) -> PackedSequence:
            question = questions[number]
            text = benchmark.task.prompt.format(question=question.turn.question)
            page = benchmark.records[question.record]
            return builder.prompt(page, question.chat_turn(text), question.before)

        answers = self._generate(builder, build, questions, max_new_tokens, {}, skips_problems=True)
        for question, answer in zip(questions, answers, strict=True):
            problem = answer.problem
            row = _row(question, answer) | ({} if problem is None else {"problem": problem})
            turn = question.turn
            generated = answer.text if problem is None else None
            rated = benchmark.task.rate(generated, turn.answers, turn.question, question.kind)
            yield row | {"known_as": question.known_as, "scores": rated}

    def _generate(
        self,
        builder: ExampleBuilder,
        build: Callable[[int], PackedSequence],
        questions: Sequence[Question],
        max_new_tokens: int,
        variables: Mapping[str, Any],
        *,
        skips_problems: bool = False,
    ) -> Iterator[Answer]:
        """What the model says to the prompts that `build` makes of questions."""
        length = builder.data.seq_len
        longest = self._loaded.config.longest_context
        return batching.answer(
            self._sampler,
            {**self._loaded.variables, **variables},
            self._loaded.tokenizer,
            Prompts(len(questions), builder, build, length, longest, skips_problems),
            self._batch_size,
            max_new_tokens,
        )

    def _header(
        self,
        directory: str | Path,
        questions: Sequence[Question],
        question: str,
        max_new_tokens: int,
        what: dict[str, Any],
    ) -> dict[str, Any]:
        """All that the predictions depend on, and what is needed to repeat them; `question` is how
        one is put."""
        tokenizer = self._loaded.tokenizer
        config = self._loaded.config
        # Spelled with its special tokens: predictions of another chat format are not taken for
        # these.
        prompt = chat.encode_prompt(tokenizer, question, 1, config.model.image_token_id)
        texts = json.dumps(
            [
                (question.id, question.turn.question, question.turn.answers, *question.told())
                for question in questions
            ]
        )
        return {
            "run": config.name,
            "run_id": config.run_id,
            "checkpoint": str(self._loaded.path),
            "step": self._loaded.step,
            # To the microsecond, this tells two runs apart that were written to the same workdir.
            "train_seconds": self._loaded.metadata["train_seconds"],
            "prompt": "".join(map(tokenizer.piece, prompt)),
            "decoding": {"method": "greedy", "max_new_tokens": max_new_tokens},
            "data": prepared.fingerprint(directory),
            "folder": str(directory),
            **what,
            "seed": config.seed,
            "num_questions": len(questions),
            "questions_crc32": zlib.crc32(texts.encode()),
        }


def _row(question: Question, answer: Answer) -> dict[str, Any]:
    return {
        "id": question.id,
        "record": question.record,
        "kind": question.kind,
        "question": question.turn.question,
        "answers": list(question.turn.answers),
        "prediction": answer.text,
        "is_cut": answer.is_cut,
    }


def blank(record: Record) -> Record:
    """Returns the record with white images of the same sizes and no words: what is answered then
    was guessed."""
    sizes = [images.decode_image(image, record.id).size for image in record.images]
    white = tuple(images.encode_png(Image.new("RGB", size, "white")) for size in sizes)
    return dataclasses.replace(record, images=white, lines=())
