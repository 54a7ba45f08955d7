"""Questions that a model is asked now and then while it is trained."""

from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, pipeline, rows, sources
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import answering, questions, scores
from alignvlm_jax.eval.questions import Question
from alignvlm_jax.infer.sampler import Sampler
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train.state import Params


class SpotCheck:
    """Questions of the validation split of every source, the same ones each time; answers are generated in batches of
    one shape, so that generation is compiled once a stage, and the training step not again."""

    def __init__(self, model: VLM, config: Config, mesh: Mesh):
        """Raises UserError where a split has no questions, a page cannot be read, or a prompt does not fit."""
        self._tokenizer = pipeline.load_tokenizer(config)
        self._sampler = Sampler(model, mesh, end_ids=chat.stop_ids(self._tokenizer), pad_id=self._tokenizer.pad_id)
        self._max_new_tokens = config.eval.max_new_tokens
        self._asked: dict[str, list[Question]] = {}
        prompts: list[rows.Row] = []
        for name, source in pipeline.by_source(config).items():
            (folder,) = source.data.folders
            records = sources.RecordSource(folder, config.data.validation_split)
            self._asked[name] = questions.choose_questions(records, config.train.generate_questions)
            if not self._asked[name]:
                raise UserError(
                    f"split {config.data.validation_split!r} in {folder} has no questions to generate answers to; "
                    "config.train.generate_every=0 asks none"
                )
            prompts += [
                rows.build_prompt(records[question.record], question.turn.question, config, self._tokenizer)
                for question in self._asked[name]
            ]
        self._prompts: Sequence[rows.Row] = rows.trim_prompts(prompts, config)
        self._batch_size = answering.batch_size(len(prompts), config.eval.batch_size, mesh_lib.batch_ways(mesh))

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
        values = _means("generated", [pair for pairs in rated.values() for pair in pairs])
        if len(rated) > 1:
            for name, pairs in rated.items():
                values |= _means(f"generated/{name}", pairs)
        return values


def _means(prefix: str, pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    return {
        f"{prefix}/anls": sum(scores.anls(*pair) for pair in pairs) / len(pairs),
        f"{prefix}/exact_match": sum(scores.exact_match(*pair) for pair in pairs) / len(pairs),
    }
