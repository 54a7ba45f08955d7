"""What connectors cost beside the same vision encoder and LLM: parameters, FLOPs, memory, time
(arXiv 2502.01341, table 7).

Neither time nor memory depends on what parameters are, so connectors that the checkpoint does not
have are drawn at random, in the settings of its config (for most, their defaults). A page is one
that fills all tiles that a question may have; every answer is as long as it may be. Times are
medians, after compiling; compare those of one table only.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from alignvlm_jax.config import Config, check
from alignvlm_jax.data import chat, examples, loader
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.pictures import html, plotting
from alignvlm_jax.plan import flops
from alignvlm_jax.shapes import Array
from alignvlm_jax.train import state

QUESTION = "What is the total?"
NO_END = (-1,)
"""End tokens of answers that never end."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one connector.

    Attributes:
      tokens_per_page: that the LLM is given.
      num_params: of the connector.
      gflops: forward of a page in the connector.
      encode_seconds: from pixels to visual tokens, a page.
      answer_seconds: from pixels to the whole answer, a page.
      tokens_per_second: of answers.
      temporary_mib: that encoding needs on a device beside parameters and pixels, as compiled.
    """

    connector: str
    tokens_per_page: int
    num_params: int
    gflops: float
    encode_seconds: float
    answer_seconds: float
    tokens_per_second: float
    temporary_mib: float


def measure(loaded: Loaded, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Returns the cost of connectors, and which of the names do not fit the checkpoint's tiles,
    with the reason.

    Args:
      loaded: whose towers are taken, and whose mesh.
      names: of connectors; none: all.
      repeats: of each timing.

    Raises:
      UserError: an unknown name, or one asked for that does not fit.
    """
    for name in names:
        connectors.get(name)
    costs = []
    left_out = {}
    for name in tiles_lib.track(tuple(names or connectors.REGISTRY), "connectors"):
        try:
            config = with_connector(loaded.config, name)
        except UserError as err:
            if names:
                raise
            left_out[name] = str(err)
            continue
        costs.append(dataclasses.asdict(cost_of(_fitted(loaded, config), repeats)))
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "batch_size": loaded.data_parallel_size,
        "answer_tokens": loaded.config.eval.max_new_tokens,
        "tiles_per_page": loaded.config.data.tiles_of_a_record,
        "num_tower_params": sum(_num_params(loaded.params[part]) for part in ("vision", "llm")),
        "costs": costs,
        "left_out": left_out,
    }


def with_connector(config: Config, name: str) -> Config:
    """Returns the config with another connector, and rows in which a page of all its tiles and a
    question fit.

    Raises:
      UserError: the connector does not fit the tiles.
    """
    model = config.model.with_connector(name)
    length = config.data.seq_len + config.data.tiles_of_a_record * model.tokens_per_tile
    data = dataclasses.replace(config.data, seq_len=length)
    return check(dataclasses.replace(config, model=model, data=data))


def cost_of(loaded: Loaded, repeats: int) -> Cost:
    """Returns what the connector of a model costs."""
    config = loaded.config
    data_parallel_size = loaded.data_parallel_size
    num_new = loaded.config.eval.max_new_tokens
    prompts = loader.stack(
        [full_prompt(loaded)] * len(sharding.rows_of_process(loaded.mesh, data_parallel_size))
    )
    with mesh_lib.use(loaded.mesh):
        tiles = sharding.put_batch({"tiles": prompts["tiles"]}, loaded.mesh)
        encode = (
            jax.jit(_visual_tokens, static_argnums=0)
            .lower(loaded.model, loaded.variables, tiles)
            .compile()
        )
        encode_seconds = _median_seconds(
            lambda: jax.block_until_ready(encode(loaded.variables, tiles)), repeats
        )
    sampler = loaded.sampler(end_ids=NO_END)
    answer_seconds = _median_seconds(
        lambda: sampler.generate(loaded.variables, prompts, num_new), repeats
    )
    return Cost(
        connector=config.model.connector.name,
        tokens_per_page=config.data.tiles_of_a_record * config.model.tokens_per_tile,
        num_params=_num_params(loaded.params["connector"]),
        gflops=flops.connector_flops(config.model, config.data.tiles_of_a_record) / 1e9,
        encode_seconds=encode_seconds / data_parallel_size,
        answer_seconds=answer_seconds / data_parallel_size,
        tokens_per_second=data_parallel_size * num_new / answer_seconds,
        temporary_mib=encode.memory_analysis().temp_size_in_bytes / 2**20,
    )


def full_prompt(loaded: Loaded) -> examples.PackedSequence:
    """Returns the prompt of a question about a page that fills all its tiles, without padding."""
    config = loaded.config
    vision = config.model.vision
    num_tiles = config.data.tiles_of_a_record
    num_slots = num_tiles * config.model.tokens_per_tile
    tokens = chat.encode_prompt(loaded.tokenizer, QUESTION, num_slots, config.model.image_token_id)
    return {
        "tokens": np.asarray(tokens, np.int32),
        "positions": np.arange(len(tokens), dtype=np.int32),
        "segment_ids": np.ones(len(tokens), np.int32),
        "tiles": np.full(
            (num_tiles, vision.tile_height, vision.tile_width, vlm.NUM_CHANNELS), 255, np.uint8
        ),
    }


def _fitted(loaded: Loaded, config: Config) -> Loaded:
    """The model with the config's connector; a random one, where it is not the checkpoint's."""
    model = VLM(config.model)
    if config.model == loaded.config.model:
        return dataclasses.replace(loaded, config=config)
    abstract = state.abstract_params(model, loaded.mesh)
    paths = {path for path in state.flatten(abstract) if path.startswith("connector/")}
    with mesh_lib.use(loaded.mesh):
        drawn = state.init_params(model, abstract, paths, jax.random.key(config.seed))
    return dataclasses.replace(
        loaded, config=config, model=model, params={**loaded.params, **drawn}
    )


def _median_seconds(fn: Callable[[], Any], repeats: int) -> float:
    fn()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _num_params(params: Mapping) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def _visual_tokens(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Array:
    return model.apply(variables, batch, method="visual_tokens")


WIDTH = 10.0
BAR_HEIGHT = 0.36
FRAME_HEIGHT = 0.75
"""Inches."""


def picture(connector: str, found: Mapping[str, Any]) -> bytes:
    """Returns a PNG of parameters, time to encode a page and tokens a page by connector, the
    model's own coloured."""
    costs = found["costs"]
    names = [cost["connector"] for cost in costs]
    colors = [plotting.COLORS[0] if name == connector else plotting.QUIET for name in names]
    panels = {
        "Parameters": [(cost["num_params"], html.count(cost["num_params"])) for cost in costs],
        "Pixels to visual tokens, ms a page": [
            (cost["encode_seconds"], f"{1e3 * cost['encode_seconds']:,.2f}") for cost in costs
        ],
        "Tokens a page": [
            (cost["tokens_per_page"], f"{cost['tokens_per_page']:,}") for cost in costs
        ],
    }

    def draw(figure: Figure) -> None:
        for axes, (title, bars) in zip(
            figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
        ):
            values, texts = zip(*bars, strict=True)
            plotting.bars(axes, names, values, texts, colors)
            axes.set_title(title)
            axes.label_outer()

    return plotting.png((WIDTH, FRAME_HEIGHT + BAR_HEIGHT * len(costs)), draw)
