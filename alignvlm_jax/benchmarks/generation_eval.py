"""In-training generation eval: questions that a model answers now and then while it is trained."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.sharding import Mesh

from alignvlm_jax.benchmarks import questions, scores
from alignvlm_jax.benchmarks.questions import Question
from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, examples, loader, shards
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.loading import Prompts
from alignvlm_jax.inference.sampler import Sampler
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import exchange, sharding
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import metrics
from alignvlm_jax.train.evaluator import Kind
from alignvlm_jax.train.state import Params
from alignvlm_jax.train.step import EvalStep


class GenerationEval:
    """Questions of the validation split of every source, the same ones each time; answers are
    generated in batches of one shape, so that generation is compiled once a stage, and the training
    step not again."""

    def __init__(self, model: VLM, config: Config, mesh: Mesh):
        """Raises UserError as `check` does."""
        self._tokenizer = loader.load_tokenizer(config)
        self._sampler = Sampler(
            model, mesh, end_ids=chat.stop_ids(self._tokenizer), pad_id=self._tokenizer.pad_id
        )
        self._max_new_tokens = config.eval.max_new_tokens
        self._chosen = _choose(config)
        count = len(self._chosen.places)
        self._batch_size = loading.batch_size(
            count, config.eval.batch_size, mesh_lib.data_parallel_size(mesh)
        )
        local_rows = sharding.rows_of_process(mesh, self._batch_size).tolist()
        mine = [start + row for start in range(0, count, self._batch_size) for row in local_rows]
        own = [
            _build(config, self._tokenizer, self._chosen, number)
            for number in mine
            if number < count
        ]
        # Of all processes: their prompts are rows of one array.
        extents = [
            extent for extent in exchange.gather(examples.extent(own, config)) if extent is not None
        ]
        self._trimmed = max(length for length, _ in extents), max(tiles for _, tiles in extents)
        self._config = config

    def run(
        self, params: Params, eval_step: EvalStep, should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """See `Evaluator`; the step is not used. Returns `generated/anls` and
        `generated/exact_match` over all questions, and with several sources `generated/SOURCE/...`
        of each."""
        generated: list[str] = []
        for start in range(0, len(self._chosen.places), self._batch_size):
            if should_stop():
                return None
            count = min(self._batch_size, len(self._chosen.places) - start)
            prompts = Prompts(count, lambda number, start=start: self._prompt(start + number))
            answers = loading.answer(
                self._sampler,
                {"params": params},
                self._tokenizer,
                prompts,
                self._batch_size,
                self._max_new_tokens,
            )
            generated += [text for text, _ in answers]
        answers = iter(generated)
        rated = {
            name: [(next(answers), question.turn.answers) for question in chosen]
            for name, chosen in self._chosen.by_source.items()
        }
        return metrics.with_sources("generated", rated, _means)

    def _prompt(self, number: int) -> examples.PackedSequence:
        return examples.trim(
            _build(self._config, self._tokenizer, self._chosen, number), *self._trimmed
        )


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The questions by source, and each by number over all of them, with the records that it is
    of."""

    by_source: dict[str, list[Question]]
    places: list[tuple[shards.RecordSource, Question]]


def is_enabled(config: Config) -> bool:
    """Returns whether a stage asks questions: it may not, and one that sees no pixels cannot."""
    return config.train.generate_every > 0 and config.train.visual_source == "pixels"


def check(stages: Iterable[Config]) -> None:
    """Raises UserError where a stage cannot ask: no source has questions in its split, a page
    cannot be read, or a prompt does not fit. The last stage of a long run is too late to be told
    so."""
    for config in stages:
        if is_enabled(config):
            chosen = _choose(config)
            tokenizer = loader.load_tokenizer(config)
            for number in range(jax.process_index(), len(chosen.places), jax.process_count()):
                _build(config, tokenizer, chosen, number)


def _choose(config: Config) -> _Chosen:
    """The questions, without sources that have none."""
    split = config.data.validation_split
    by_source = {}
    places = []
    validated = loader.by_source(config)
    for name, source in validated.items():
        (folder,) = source.data.folders
        records = shards.RecordSource(folder, split)
        if found := questions.choose_questions(records, config.train.generate_questions):
            by_source[name] = found
            places += [(records, question) for question in found]
    if not places:
        folders = ", ".join(
            folder for source in validated.values() for folder in source.data.folders
        )
        raise UserError(
            f"split {split!r} in {folders} has no questions to generate answers to; "
            "config.train.generate_every=0 asks none"
        )
    return _Chosen(by_source, places)


def _build(
    config: Config, tokenizer: Tokenizer, chosen: _Chosen, number: int
) -> examples.PackedSequence:
    records, question = chosen.places[number]
    return examples.build_prompt(
        records[question.record], question.turn.question, config, tokenizer
    )


def _means(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    return {
        "anls": sum(scores.anls(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(scores.exact_match(*pair) for pair in pairs) / len(pairs),
    }


GENERATION = Kind(
    name="generated answers",
    phase="generating",
    every=lambda config: config.train.generate_every if is_enabled(config) else 0,
    open=GenerationEval,
    check=check,
)
