"""What is wrong with any stage of a run, told before a workdir is touched or anything is compiled."""

from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.data import pipeline
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, state, warm_start
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import Params


def check(stages: tuple[Config, ...]) -> None:
    """Raises UserError where a stage asks for what is not there: a connector, a mesh for its batch, sizes that divide
    over it, data and tasks, parameters to train, to load from the stage before or from `init_from`."""
    shapes: dict[tuple, Params] = {}
    before: Params | None = None
    for config in stages:
        connectors.get(config.model.connector.name)
        mesh = mesh_lib.make_mesh(config)
        pipeline.TrainRows(config, config.data.split)
        pipeline.by_source(config)
        # Stages mostly share a model, and tracing it takes most of a second.
        key = config.model, config.mesh
        if key not in shapes:
            shapes[key] = state.abstract_params(vlm.VLM(config.model), config, mesh)
        state.trainable_paths(config, shapes[key])
        if before is None and config.init_from:
            _check_init_from(config, shapes[key])
        if before is not None:
            state.match_paths(config.train.load, state.flatten(before), "train.load")
        before = shapes[key]


def _check_init_from(config: Config, abstract: Params) -> None:
    wanted = {path: x.shape for path, x in state.flatten(abstract).items()}

    def check(checkpoints: Checkpoints, step: int) -> None:
        stored = {path: x.shape for path, x in checkpoints.stored_params(step).items()}
        warm_start.loadable(config, stored, wanted, checkpoints.folder / str(step))

    checkpoint.read_newest(storage.path(config.init_from), check)
