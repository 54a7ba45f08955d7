"""The cost of connectors beside the same vision encoder and LLM (arXiv 2502.01341, table 7).

It has parameters, FLOPs, memory and time. Neither time nor memory depends on the values of
parameters, so connectors that the checkpoint does not have are initialised at random, with the
settings of its config (for most, their defaults). The page fills all tiles that a question may
have, and every answer has the largest length. Connectors take turns: what else the machine does
meanwhile slows all of them alike. Times are the least of all turns, after compiling; how far the
median lies above it says how quiet the machine was. Only times of one table compare.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from alignvlm_jax.analysis import base
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.config import Config, check
from alignvlm_jax.data import chat, loader, sequences
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.pictures import html, plotting
from alignvlm_jax.plan import flops
from alignvlm_jax.shapes import Array, Float
from alignvlm_jax.train import state

QUESTION = "What is the total?"
NO_END = (-1,)
"""Stop tokens that no model generates, so that every answer has the largest length."""

# Of the figure, in inches.
WIDTH = 10.0
BAR_HEIGHT = 0.36
FRAME_HEIGHT = 0.75

COLUMNS = (
    "visual tokens", "parameters", "GFLOP", "encode ms", "median +", "answer ms", "tokens/s",
    "extra MiB",
)  # fmt: skip
MAX_SPREAD = 0.3
"""Of the median above the least time: beyond it the times of a table are not compared."""


class ConnectorCosts(Analysis):
    """The analysis of the cost of each connector, with a row and a bar for each."""

    name = "cost"
    title = "What connectors cost"

    def check(self, config: Config, args: argparse.Namespace) -> None:
        for name in args.connectors:
            # The first raises for an unknown name, the second if it does not fit the model's tiles.
            connectors.get(name)
            with_connector(config, name)

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure(loaded, args.connectors, args.repeats)

    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints a table with a row for each connector."""
        console.print(
            f"{found['device']}, {found['batch_size']} pages at once of {found['tiles_per_page']} "
            f"tiles, answers of {found['answer_tokens']} tokens; vision encoder and LLM: "
            f"{found['num_tower_params']:,} parameters"
        )
        table = base.table("connector", *COLUMNS)
        for cost in found["costs"]:
            table.add_row(
                cost["connector"],
                f"{cost['tokens_per_page']:,}",
                f"{cost['num_params']:,}",
                f"{cost['gflops']:.3g}",
                f"{1e3 * cost['encode_seconds']:.2f}",
                f"{cost['encode_spread']:.0%}",
                f"{1e3 * cost['answer_seconds']:.2f}",
                f"{cost['tokens_per_second']:.1f}",
                f"{cost['temporary_mib']:.1f}",
            )
        console.print(table)
        for name, reason in found["left_out"].items():
            console.print(f"{name} is left out: {reason}", markup=False)

    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of parameters, encoding time and tokens of a page, by connector.

        The bars of the model's own connector are coloured.
        """
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
            row = figure.subplots(1, len(panels), sharey=True)
            for axes, (title, bars) in zip(row, panels.items(), strict=True):
                values, texts = zip(*bars, strict=True)
                plotting.bars(axes, names, values, texts, colors)
                axes.set_title(title)
                axes.label_outer()

        return plotting.png((WIDTH, FRAME_HEIGHT + BAR_HEIGHT * len(costs)), draw)

    def sentence(self, written: Mapping[str, Any]) -> str:
        costs = written["costs"]
        # The model's own connector, unless --connectors left it out.
        own = (cost for cost in costs if cost["connector"] == written["connector"])
        shown = next(own, costs[0])
        spread = max(cost.get("encode_spread", math.inf) for cost in costs)
        quickest = min(costs, key=lambda cost: cost["encode_seconds"])
        text = (
            f"With {shown['connector']}, {html.count(shown['num_params'])} parameters, a page "
            f"takes {1e3 * shown['encode_seconds']:.2f} ms from pixels to its "
            f"{shown['tokens_per_page']:,} visual tokens ({written['device']})"
        )
        if spread > MAX_SPREAD:
            text += (
                "; the times of connectors are not compared, for on this machine they differed "
                f"between turns by {spread:.0%}"
                if math.isfinite(spread)
                else "; measured one connector after the other, times are not compared"
            )
        elif quickest is not shown:
            text += (
                f"; with {quickest['connector']}, the quickest, "
                f"{1e3 * quickest['encode_seconds']:.2f} ms"
            )
        return f"{text}."


ANALYSIS = ConnectorCosts()


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one connector.

    Attributes:
      connector: its name.
      tokens_per_page: number of visual tokens of a page that the LLM is given.
      num_params: number of parameters of the connector.
      gflops: 10^9 FLOPs of the connector's forward pass for a page.
      encode_seconds: seconds from pixels to visual tokens, for a page: the least of all turns.
      encode_spread: how far the median of the turns lies above it, as a fraction of it.
      answer_seconds: seconds from pixels to the complete answer, for a page.
      tokens_per_second: generated tokens a second, with the time of encoding in it.
      temporary_mib: MiB that the compiled encoding needs on a device beside parameters and pixels.
    """

    connector: str
    tokens_per_page: int
    num_params: int
    gflops: float
    encode_seconds: float
    encode_spread: float
    answer_seconds: float
    tokens_per_second: float
    temporary_mib: float


def measure(loaded: Loaded, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Returns the cost of connectors, and the reason for each connector that was left out.

    Args:
      loaded: the model whose towers and mesh are used.
      names: names of connectors; if empty, all that fit the model's tiles.
      repeats: turns of each connector.

    Raises:
      UserError: a name is unknown, or a named connector does not fit the model's tiles.
    """
    for name in names:
        connectors.get(name)
    trials = []
    left_out = {}
    for name in tiles_lib.track(tuple(names or connectors.REGISTRY), "connectors"):
        try:
            config = with_connector(loaded.config, name)
        except UserError as err:
            # A connector that the user named is not left out silently.
            if names:
                raise
            left_out[name] = str(err)
            continue
        fitted = _fitted(dataclasses.replace(loaded, config=config))
        trials.append(Trial(fitted))
    for _ in tiles_lib.track(range(repeats), "turns"):
        for trial in trials:
            trial.take_turn()
    costs = [dataclasses.asdict(trial.cost()) for trial in trials]
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
    """Returns the config with another connector, and with a sequence length that fits a full page,
    of which no patch is left out.

    Raises:
      UserError: the connector does not fit the tiles.
    """
    model = config.model.with_connector(name)
    # Longer by a full page of this connector's tokens, which may be more than the trained one's.
    length = config.data.seq_len + config.data.tiles_of_a_record * model.tokens_per_tile
    data = dataclasses.replace(config.data, seq_len=length, blank_contrast=0)
    return check(dataclasses.replace(config, model=model, data=data))


class Trial:
    """A model whose encoding and whole answers are compiled, and timed turn by turn."""

    def __init__(self, loaded: Loaded):
        self._loaded = loaded
        # A batch has a page for each data-parallel device, and times are divided by their number.
        local_rows = sharding.rows_of_process(loaded.mesh, loaded.data_parallel_size)
        self._prompts = loader.stack([full_prompt(loaded)] * len(local_rows))
        with mesh_lib.use(loaded.mesh):
            self._tiles = sharding.put_batch({"tiles": self._prompts["tiles"]}, loaded.mesh)
            # Compiled ahead of time: only a compiled program tells its memory.
            self._encode = (
                jax.jit(_visual_tokens, static_argnums=0)
                .lower(loaded.model, loaded.variables, self._tiles)
                .compile()
            )
        self._sampler = loaded.sampler(end_ids=NO_END)
        self._encode_seconds: list[float] = []
        self._answer_seconds: list[float] = []
        self._answer()  # Compiles.

    def take_turn(self) -> None:
        """Times both once."""
        variables = self._loaded.variables
        # Once untimed: the turn of another connector has just emptied the caches.
        self._encode(variables, self._tiles)
        # Without block_until_ready only the dispatch would be timed.
        self._encode_seconds.append(
            _seconds(lambda: jax.block_until_ready(self._encode(variables, self._tiles)))
        )
        self._answer_seconds.append(_seconds(self._answer))

    def cost(self) -> Cost:
        """Returns the cost by all turns that were taken."""
        config = self._loaded.config
        size = self._loaded.data_parallel_size
        encode = min(self._encode_seconds)
        answer = min(self._answer_seconds)
        return Cost(
            connector=config.model.connector.name,
            tokens_per_page=config.data.tiles_of_a_record * config.model.tokens_per_tile,
            num_params=_num_params(self._loaded.params["connector"]),
            gflops=flops.connector_flops(config.model, config.data.tiles_of_a_record) / 1e9,
            encode_seconds=encode / size,
            encode_spread=statistics.median(self._encode_seconds) / encode - 1,
            answer_seconds=answer / size,
            tokens_per_second=size * config.eval.max_new_tokens / answer,
            temporary_mib=self._encode.memory_analysis().temp_size_in_bytes / 2**20,
        )

    def _answer(self) -> None:
        # `generate` returns NumPy arrays, and so waits for the devices by itself.
        most = self._loaded.config.eval.max_new_tokens
        self._sampler.generate(self._loaded.variables, self._prompts, most)


def full_prompt(loaded: Loaded) -> sequences.PackedSequence:
    """Returns the unpadded prompt of a question about a page that fills all tiles."""
    config = loaded.config
    vision = config.model.vision
    num_tiles = config.data.tiles_of_a_record
    num_image_tokens = num_tiles * config.model.tokens_per_tile
    tokens = chat.encode_prompt(
        loaded.tokenizer,
        QUESTION,
        num_image_tokens,
        config.model.image_token_id,
        text_unit=config.data.text_unit,
    )
    # Its own length, not the config's: padding would cost every connector the same, and hide their
    # differences. Tiles, uint8 [I, height, width, 3], are white: time does not depend on pixels.
    return {
        "tokens": np.asarray(tokens, np.int32),
        "positions": np.arange(len(tokens), dtype=np.int32),
        "segment_ids": np.ones(len(tokens), np.int32),
        "tiles": np.full(
            (num_tiles, vision.tile_height, vision.tile_width, vlm.NUM_CHANNELS), 255, np.uint8
        ),
    }


def _fitted(loaded: Loaded) -> Loaded:
    """Returns the model with its config's connector, initialised if the checkpoint's is another."""
    config = loaded.config
    if config.model.connector == loaded.model.config.connector:
        return loaded
    model = VLM(config.model)
    abstract = state.abstract_params(model, loaded.mesh)
    # The towers stay the checkpoint's own arrays: several models share them on the devices.
    paths = {path for path in state.flatten(abstract) if path.startswith("connector/")}
    with mesh_lib.use(loaded.mesh):
        initialised = state.init_params(model, abstract, paths, jax.random.key(config.seed))
    return dataclasses.replace(loaded, model=model, params={**loaded.params, **initialised})


def _seconds(fn: Callable[[], Any]) -> float:
    """Returns the wall time of a call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _num_params(params: Mapping) -> int:
    """Returns the number of parameters in a tree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def _visual_tokens(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> Float[Array, "B M D"]:
    return model.apply(variables, batch, method="visual_tokens")
