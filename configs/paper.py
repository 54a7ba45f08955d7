"""Settings that the paper's three stages, `stage1.py` to `stage3.py`, have in common.

The paper (arXiv 2502.01341, sections 3.3 and 4, table 6) gives the encoder, the LLMs, at most 9
tiles, batch sizes, learning rates, text lengths, epochs and what is frozen. It states no optimizer,
schedule, warm-up, weight decay, precision, or number of image tokens; these are chosen here:

    an overview tile beside the 9       as Ovis v1.6 does, whose tiling the paper cites
    text length beside image tokens     the paper does not say whether its lengths count them
    offline packing                     alone in a sequence, records leave a third to half unused
    20 tiles a sequence                 two pages of ten or four photos of five: any sizes fill it
                                        (docs/results.md, "The paper's stages packed")
    seq_len a multiple of 512           attention kernels work on blocks of 512
    batches of 2^n sequences            they divide over chips; the closest to the paper's records
    steps by records                    as many as see the paper's number of them
    AdamW 0.9, 0.95, decay 0.1, clip 1  usual for Llamas of this size
    warm-up 3 %, cosine to 0            LLaVA's, on which the paper's low-resource study is built
    bfloat16 compute, float32 masters   what TPUs are made for
    patch-token weight 0                the paper as it is; docs/training.md, "Patch labels"
"""

import dataclasses
import math

import ml_collections

from alignvlm_jax import config as config_lib
from alignvlm_jax import presets
from alignvlm_jax.errors import nearest

MAX_TILES = 9 + 1  # and the overview
"""Of a record."""
SEQUENCE_TILES = 2 * MAX_TILES
BLOCK = 512
"""Tokens that attention kernels work on at a time."""
LLMS = ("llama32_1b", "llama32_3b", "llama31_8b")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the paper, which is a column of its table 6.

    Attributes:
      name: name of the stage.
      num_records: number of records of its data.
      epochs: number of passes over them.
      text_length: tokens of text of a record, beside image tokens.
      seq_len: tokens of a packed sequence; it has `SEQUENCE_TILES`.
      records_per_sequence: records that are packed into a sequence on average, of data as
        `tests/paper_data.py` has them: the stage says at its start how many there are.
      batch_size: records in a batch, by LLM.
      learning_rate: peak learning rate, by LLM.
      trainable: patterns of the parameters that are trained.
    """

    name: str
    num_records: int
    epochs: int
    text_length: int
    seq_len: int
    records_per_sequence: float
    batch_size: dict[str, int]
    learning_rate: dict[str, float]
    trainable: tuple[str, ...] = (".*",)

    def num_sequences(self, llm: str) -> int:
        """Returns the packed sequences in a batch: the power of two whose records are the closest
        to `batch_size`, by their ratio."""
        return 2 ** round(math.log2(self.batch_size[llm] / self.records_per_sequence))


def by_llm(*values: float) -> dict[str, float]:
    """Returns a row of table 6 by LLM, from its values for 1B, 3B and 8B."""
    return dict(zip(LLMS, values, strict=True))


def make_config(stage: Stage, llm: str) -> ml_collections.ConfigDict:
    """Returns the config of a stage with one of `LLMS`.

    Raises:
      ValueError: there is no such LLM.
    """
    if llm not in LLMS:
        raise ValueError(
            f"{stage.name} is known for {', '.join(LLMS)}, not for {llm!r}{nearest(llm, LLMS)}"
        )
    config = config_lib.default_config_dict()
    config.name = f"{stage.name}_{llm}"
    set_model(config, llm)
    config.data.dir = f"data/{stage.name}"
    set_packing(config, stage.seq_len)
    config.data.tasks = {"answer": 1.0}
    config.data.images_first = True
    batch_size = stage.num_sequences(llm)
    config.train.batch_size = batch_size
    config.train.num_records = stage.num_records * stage.epochs
    config.train.num_steps = math.ceil(
        config.train.num_records / (batch_size * stage.records_per_sequence)
    )
    config.train.trainable = stage.trainable
    config.train.patch_token_weight = 0.0
    config.train.log_every = 10
    config.train.validate_every = config.train.checkpoint_every = 500
    # So that a lost host costs less than 10 minutes on average, also on the smallest slice, where a
    # step of 8B takes 8.4 minutes. Training continues while checkpoints are written.
    config.train.checkpoint_minutes = 8.0
    config.train.validation_sequences = 4 * batch_size
    set_optimizer(config, stage.learning_rate[llm])
    config.optim.warmup_steps = math.ceil(0.03 * config.train.num_steps)
    config.stages = {stage.name: {}}
    return config


def set_model(config: ml_collections.ConfigDict, llm: str) -> None:
    """Sets the model, SigLIP-400M and a Llama 3 joined by ALIGN, and a mesh over all devices."""
    config_lib.set_preset(config.model.vision, presets.VISION["siglip_so400m_14_384"])
    config_lib.set_preset(config.model.llm, presets.LLM[llm])
    # The tile has 27 columns of patches, which 4, the usual number, does not divide.
    config.model.connectors.h_reducer.merged_columns = 3
    # Llama 3 has no image token: the id is the first one beyond the embedding table.
    config.model.image_token_id = config.model.llm.vocab_size
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    # Of a pod's memory it is little, and ALIGN takes a fifth less time than by 64 MiB.
    config.model.chunk_size_mib = 256.0
    config.mesh.data = -1
    config.mesh.fsdp = -1
    config.mesh.tensor = -1


def set_packing(config: ml_collections.ConfigDict, seq_len: int) -> None:
    """Sets the tiles of a record, and what a packed sequence of several has room for."""
    config.data.packing = "offline"
    config.data.use_overview = True
    config.data.record_tiles = MAX_TILES
    config.data.max_tiles = SEQUENCE_TILES
    config.data.seq_len = seq_len


def set_optimizer(config: ml_collections.ConfigDict, learning_rate: float) -> None:
    """Sets AdamW as described above, but for the warm-up, which depends on the number of steps."""
    config.optim.learning_rate = learning_rate
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.final_fraction = 0.0
