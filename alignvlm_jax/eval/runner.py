"""Asks a model the questions of a split, on the page or on a blank one, and writes down what it says."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from rich import progress
from rich.console import Console
from rich.text import Text

from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, images, pages, pipeline, rows, sources
from alignvlm_jax.data.schema import Record, Turn
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import loading, predictions, scores
from alignvlm_jax.eval.loading import Loaded
from alignvlm_jax.eval.predictions import Predictions


@dataclasses.dataclass(frozen=True)
class Question:
    """A turn of a record: `record` is the record's index in its split, `id` names both."""

    id: str
    record: int
    turn: Turn


class Runner:
    """Evaluates one model; every split has the same batch shape, so that generation is compiled once."""

    def __init__(self, loaded: Loaded, config: Config):
        """`config` may differ from the model's own in `eval` and `data.dir`."""
        self._loaded = loaded
        self._config = config
        self._sampler = loaded.sampler()
        ways = loaded.batch_ways
        self._batch_size = -(-config.eval.batch_size // ways) * ways

    def evaluate(self, split: str, blind: bool) -> Predictions:
        """Returns the predictions on a split, and leaves them in the workdir; questions already answered by this very
        checkpoint, in this very way, are not asked again.

        Raises:
          UserError: the split is missing or has no questions, or a question does not fit `data.row_length`.
        """
        records = sources.RecordSource(self._config.data.dir, split)
        questions = choose_questions(records, self._config.eval.num_questions)
        if not questions:
            raise UserError(f"split {split!r} in {self._config.data.dir} has no questions")
        path = predictions.path_of(loading.workdir_of(self._loaded.path), split, blind)
        header = self._header(split, blind, questions)
        finished = predictions.read(path)
        if finished is not None and finished.header == header:
            return finished
        writer = predictions.Writer(path, header)
        name = f"{split}, blank pages" if blind else split
        done = len(writer.predictions.rows)
        with _progress_bar() as bar:
            task = bar.add_task(name, total=len(questions), completed=done)
            for start in range(done, len(questions), self._batch_size):
                asked = questions[start : start + self._batch_size]
                writer.append(list(self._answer(records, asked, blind)))
                bar.advance(task, len(asked))
        return writer.publish()

    def _answer(
        self, records: Sequence[Record], questions: Sequence[Question], blind: bool
    ) -> Iterator[dict[str, Any]]:
        seen = [records[question.record] for question in questions]
        prompts = [
            rows.build_prompt(
                blank(record) if blind else record, question.turn.question, self._config, self._loaded.tokenizer
            )
            for record, question in zip(seen, questions, strict=True)
        ]
        # A short batch repeats its last row: it ends generation no later than the rows that count.
        prompts += prompts[-1:] * (self._batch_size - len(prompts))
        tokens_BT = self._sampler.generate(pipeline.stack(prompts), self._config.eval.max_new_tokens)
        for record, question, tokens_T in zip(seen, questions, tokens_BT, strict=False):
            answers, prediction = question.turn.answers, self._loaded.tokenizer.decode(tokens_T)
            yield {
                "id": question.id,
                "record": question.record,
                "kind": record.source,
                "question": question.turn.question,
                "answers": list(answers),
                "prediction": prediction,
                "score": scores.anls(prediction, answers),
                "exact": scores.exact_match(prediction, answers),
            }

    def _header(self, split: str, blind: bool, questions: Sequence[Question]) -> dict[str, Any]:
        """All that the predictions depend on, and what is needed to repeat them."""
        tokenizer = self._loaded.tokenizer
        prompt = chat.encode_prompt(tokenizer, "QUESTION", 1, self._config.model.image_token_id)
        asked = json.dumps([(question.id, question.turn.question, question.turn.answers) for question in questions])
        return {
            "checkpoint": str(self._loaded.path),
            "step": self._loaded.step,
            # To the microsecond, this tells two runs apart that were written to the same workdir.
            "train_seconds": self._loaded.metadata["train_seconds"],
            "prompt": "".join(map(tokenizer.piece, prompt)),
            "decoding": {"method": "greedy", "max_new_tokens": self._config.eval.max_new_tokens},
            "scorer_version": scores.SCORER_VERSION,
            "data": sources.fingerprint(self._config.data.dir),
            "split": split,
            "blind": blind,
            "seed": self._config.seed,
            "num_questions": len(questions),
            "questions_crc32": zlib.crc32(asked.encode()),
        }


def choose_questions(records: Sequence[Record], count: int) -> list[Question]:
    """Returns at most `count` questions: one a document, then a second of each where they are too few, and so on.

    Documents are spread evenly over the split, and a hash of its id says which question of a document comes first, so
    that the choice depends on the data alone.
    """
    num_documents = min(count, len(records))
    indices = [i * len(records) // num_documents for i in range(num_documents)]
    ids_and_turns = [(records[i].id, records[i].turns) for i in indices]
    questions = []
    for round_number in range(max((len(turns) for _, turns in ids_and_turns), default=0)):
        for index, (record_id, turns) in zip(indices, ids_and_turns, strict=True):
            if round_number < len(turns):
                turn = (zlib.crc32(record_id.encode()) + round_number) % len(turns)
                questions.append(Question(f"{record_id}/{turn}", index, turns[turn]))
    return questions[:count]


def blank(record: Record) -> Record:
    """Returns the record with white images of the same sizes and no words: what is answered then was guessed."""
    sizes = [images.decode_image(image, record.id).size for image in record.images]
    white = tuple(pages.encode_png(Image.new("RGB", size, "white")) for size in sizes)
    return dataclasses.replace(record, images=white, lines=())


class _Rate(progress.ProgressColumn):
    """Questions a second, once there are any."""

    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:.1f} questions/s" if task.speed else "")


def _progress_bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        _Rate(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
