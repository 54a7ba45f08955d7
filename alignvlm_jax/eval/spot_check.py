"""Questions that a model is asked now and then while it is trained."""

from collections.abc import Callable, Iterable, Sequence

from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, pipeline, rows, sources
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import answering, questions, scores
from alignvlm_jax.eval.questions import Question
from alignvlm_jax.infer.sampler import Sampler
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import metrics
from alignvlm_jax.train.state import Params


class SpotCheck:
    """Questions of the validation split of every source, the same ones each time; answers are generated in batches of
    one shape, so that generation is compiled once a stage, and the training step not again."""

    def __init__(self, model: VLM, config: Config, mesh: Mesh):
        """Raises UserError as `check` does."""
        self._tokenizer = pipeline.load_tokenizer(config)
        self._sampler = Sampler(model, mesh, end_ids=chat.stop_ids(self._tokenizer), pad_id=self._tokenizer.pad_id)
        self._max_new_tokens = config.eval.max_new_tokens
        self._asked, self._prompts = _choose(config, self._tokenizer)
        self._batch_size = answering.batch_size(len(self._prompts), config.eval.batch_size, mesh_lib.batch_ways(mesh))

    def scores(self, params: Params, should_stop: Callable[[], bool]) -> dict[str, float]:
        """Returns `generated/anls` and `generated/exact_match` over all questions, and with several sources
        `generated/SOURCE/...` of each; nothing when told to stop meanwhile."""
        said: list[str] = []
        for start in range(0, len(self._prompts), self._batch_size):
            if should_stop():
                return {}
            batch = self._prompts[start : start + self._batch_size]
            said += answering.answer(
                self._sampler, {"params": params}, self._tokenizer, batch, self._batch_size, self._max_new_tokens
            )
        answers = iter(said)
        rated = {
            name: [(next(answers), question.turn.answers) for question in asked] for name, asked in self._asked.items()
        }
        return metrics.with_sources("generated", rated, _means)


def is_asked(config: Config) -> bool:
    """Returns whether a stage asks questions: it may not, and one that sees no pixels cannot."""
    return config.train.generate_every > 0 and config.train.visual_input == "pixels"


def check(stages: Iterable[Config]) -> None:
    """Raises UserError where a stage cannot ask: no source has questions in its split, a page cannot be read, or a
    prompt does not fit. The last stage of a long run is too late to be told so."""
    for config in stages:
        if is_asked(config):
            _choose(config, pipeline.load_tokenizer(config))


def _choose(config: Config, tokenizer: Tokenizer) -> tuple[dict[str, list[Question]], list[rows.Row]]:
    """The questions by source, without sources that have none; and the prompts of all of them in that order."""
    split, asked, prompts = config.data.validation_split, {}, []
    validated = pipeline.by_source(config)
    for name, source in validated.items():
        (folder,) = source.data.folders
        records = sources.RecordSource(folder, split)
        if found := questions.choose_questions(records, config.train.generate_questions):
            asked[name] = found
            prompts += [rows.build_prompt(records[q.record], q.turn.question, config, tokenizer) for q in found]
    if not asked:
        folders = ", ".join(folder for source in validated.values() for folder in source.data.folders)
        raise UserError(
            f"split {split!r} in {folders} has no questions to generate answers to; "
            "config.train.generate_every=0 asks none"
        )
    return asked, rows.trim_prompts(prompts, config)


def _means(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    return {
        "anls": sum(scores.anls(*pair) for pair in pairs) / len(pairs),
        "exact_match": sum(scores.exact_match(*pair) for pair in pairs) / len(pairs),
    }
