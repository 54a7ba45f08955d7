"""In-training generation eval: questions that a model answers now and then while it is trained."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh

from alignvlm_jax.benchmarks import questions, scores
from alignvlm_jax.benchmarks.questions import Question
from alignvlm_jax.config import Config, TrainConfig
from alignvlm_jax.data import chat, validation
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.loader import TrainSequences
from alignvlm_jax.data.sequences import PackedSequence, prompt_length
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError, counted
from alignvlm_jax.inference import batching
from alignvlm_jax.inference.batching import Prompts
from alignvlm_jax.inference.sampler import Sampler
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import exchange, sharding
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train.evaluator import Kind, with_sources
from alignvlm_jax.train.state import Params
from alignvlm_jax.train.step import EvalStep


class GenerationEval:
    """Questions of the validation split of every source, the same ones each time; answers are
    generated in batches of one shape, so that generation is compiled once a stage, and the training
    step not again."""

    def __init__(self, model: VLM, config: Config, mesh: Mesh, opened: StageData):
        """Raises UserError as `check` does."""
        self._tokenizer = opened.tokenizer
        self._builder = ExampleBuilder.of(config, opened.tokenizer)
        self._sampler = Sampler(
            model, mesh, end_ids=chat.stop_ids(self._tokenizer), pad_id=self._tokenizer.pad_id
        )
        self._max_new_tokens = config.eval.max_new_tokens
        sources = validation.by_source(config, opened)
        self._chosen = _choose(sources, config.train.generate_questions, opened)
        count = len(self._chosen.places)
        self.sample = counted(count, "held-out question")
        self._batch_size = batching.batch_size(
            count, config.eval.batch_size, mesh_lib.data_parallel_size(mesh)
        )
        local_rows = sharding.rows_of_process(mesh, self._batch_size).tolist()
        # The questions whose rows this process feeds: it opens the pages of these alone.
        mine = [start + row for start in range(0, count, self._batch_size) for row in local_rows]
        own = [self._chosen.prompt(number, self._builder) for number in mine if number < count]
        # Of all processes: their prompts are rows of one array.
        extents = [one for one in exchange.gather(self._builder.extent(own)) if one is not None]
        # Room for the longest in the cache; each prompt is read in the bucket of its own size.
        self._length = max(length for length, _ in extents)

    def run(
        self, params: Params, eval_step: EvalStep, should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """See `Evaluator`; the step is not used. Returns `generated/anls` and
        `generated/exact_match` over all questions, and with several sources `generated/SOURCE/...`
        of each."""
        if should_stop():
            return None
        count = len(self._chosen.places)
        # That they fit `check` has seen.
        prompts = Prompts(count, self._builder, self._prompt, self._length, longest_context=0)
        generated: list[str] = []
        for one in batching.answer(
            self._sampler,
            {"params": params},
            self._tokenizer,
            prompts,
            self._batch_size,
            self._max_new_tokens,
        ):
            generated.append(one.text)
            # All processes are told together, which costs too much for every answer.
            if len(generated) % self._batch_size == 0 and should_stop():
                return None
        # Questions were numbered source after source, in the order of `by_source`.
        answers = iter(generated)
        rated = {
            name: [(next(answers), question.turn.answers) for question in chosen]
            for name, chosen in self._chosen.by_source.items()
        }
        return with_sources("generated", rated, _means)

    def _prompt(self, number: int) -> PackedSequence:
        return self._chosen.prompt(number, self._builder)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The questions by source, and each by number over all of them, with the records that it is
    of."""

    by_source: dict[str, list[Question]]
    places: list[tuple[RecordSource, Question]]

    def prompt(self, number: int, builder: ExampleBuilder) -> PackedSequence:
        """Returns the prompt of a question by its number."""
        records, question = self.places[number]
        return builder.prompt(records[question.record], question.chat_turn(), question.before)


def is_enabled(train: TrainConfig) -> bool:
    """Returns whether a stage asks questions: it may not, and one that sees no pixels cannot."""
    return train.generate_every > 0 and train.visual_source == "pixels"


def check(config: Config, opened: StageData) -> None:
    """Raises UserError where a stage cannot ask: no source has questions in its split, a page
    cannot be read, or a prompt does not fit. The last stage of a long run is too late to be told
    so."""
    if not is_enabled(config.train):
        return
    sources = validation.by_source(config, opened)
    chosen = _choose(sources, config.train.generate_questions, opened)
    builder = ExampleBuilder.of(config, opened.tokenizer)
    # Each process builds every n-th prompt: pages are opened once, not once a host.
    for number in range(jax.process_index(), len(chosen.places), jax.process_count()):
        length = prompt_length(chosen.prompt(number, builder))
        batching.check_context(length, config.eval.max_new_tokens, config.longest_context)


def _choose(sources: Mapping[str, TrainSequences], count: int, opened: StageData) -> _Chosen:
    """Returns at most `count` questions of each source, without sources that have none."""
    by_source = {}
    places = []
    folders = []
    for name, sequences in sources.items():
        data = sequences.builder.data
        (folder,) = data.folders
        folders.append(folder)
        records = opened.records(folder, data.validation_split)
        # A collective: all processes go through the sources, in this order, or the others wait for
        # ever.
        if found := questions.choose_questions(records, count):
            by_source[name] = found
            places += [(records, question) for question in found]
    if not places:
        raise UserError(
            f"split {data.validation_split!r} in {', '.join(folders)} has no questions with an "
            "answer to generate; config.train.generate_every=0 asks none"
        )
    return _Chosen(by_source, places)


def _means(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    return {
        "anls": sum(scores.anls(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(scores.exact_match(*pair) for pair in pairs) / len(pairs),
    }


GENERATION = Kind(
    name="generated answers",
    phase="generating",
    every=lambda config: config.train.generate_every if is_enabled(config.train) else 0,
    open=GenerationEval,
    check=check,
)
