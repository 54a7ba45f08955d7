"""The fields of a stage: frozen dataclasses with their defaults."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignvlm_jax.config import options as connectors
from alignvlm_jax.config.options import ConnectorConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP encoder, or one of its shape. Sizes in pixels; each tile is encoded independently of the others.

    Pixels of 0..1 are normalised by `pixel_mean` and `pixel_std` of red, green and blue; the defaults are those of
    SigLIP's own weights, as is "tanh", the approximation of GELU ("exact": DINOv2's).
    """

    tile_height: int = 32
    tile_width: int = 128
    patch_height: int = 16
    patch_width: int = 8
    width: int = 128
    mlp_width: int = 384
    num_layers: int = 3
    num_heads: int = 4
    norm_eps: float = 1e-6
    gelu: str = "tanh"
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a tile."""
        return self.tile_height // self.patch_height, self.tile_width // self.patch_width

    @property
    def num_patches(self) -> int:
        rows, columns = self.patch_grid
        return rows * columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling; a factor of 1 is no scaling."""

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """The Llama decoder.

    The last `padded_rows` of its tables are no words; with them `vocab_size` divides over a mesh.
    """

    vocab_size: int = 128
    width: int = 128
    mlp_width: int = 256
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_embeddings: bool = True
    padded_rows: int = 0

    @property
    def num_words(self) -> int:
        """Rows of the tables that are words."""
        return self.vocab_size - self.padded_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. `connector` holds the options of the connector chosen; `connectors`, by name, those that others
    would have, where they are not the defaults: `with_connector` takes them, and nothing else looks at them.

    `dtype` is that of the computation; parameters are float32.

    `image_token_id` marks the image slots in a row of tokens; it must be the tokenizer's. `scan_unroll` layers of a
    tower are compiled in a row: 1 for large models; all of them make a small one a third faster on CPU. `attention` is
    the kernel of training, prefill and the vision tower, "auto": splash on TPU, cudnn on GPU in bfloat16, else xla.
    What lies over the vocabulary, ALIGN and the loss, is computed whole (`vocab_form` "plain"), or a block of rows at a
    time ("blockwise"), of at most `vocab_block_mib` MiB of logits on a device; "auto" is blockwise where they are more.
    """

    vision: VisionConfig = VisionConfig()
    llm: LLMConfig = LLMConfig()
    connector: ConnectorConfig = dataclasses.field(default_factory=connectors.connector)
    connectors: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, compare=False)
    image_token_id: int = 4
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    vocab_form: str = "auto"
    vocab_block_mib: float = 64.0
    attention: str = "auto"

    @property
    def slots_per_tile(self) -> int:
        """Image slots that one tile takes in a row of tokens: the count that data and model share."""
        return connectors.connector_class(self.connector.name).num_tokens(self.vision, self.connector)

    def with_connector(self, name: str) -> "ModelConfig":
        """Returns the model with another connector; UserError with the nearest name for none."""
        if name == self.connector.name:
            return self
        return dataclasses.replace(self, connector=connectors.connector(name, **self.connectors.get(name, {})))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of a mixture. Its share of an epoch's records goes as weight * (size * repeat) ** (1 / temperature).

    `dir` holds what `prepare` wrote. A `repeat` of 2 counts every record twice, of 0.5 every second one. `cap` bounds
    the records that an epoch takes of it, 0: nothing does; what it takes away is given to no other source.
    """

    dir: str = ""
    weight: float = 1.0
    repeat: float = 1.0
    cap: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a row is made of. `dir` holds what `prepare` wrote: shards by split and the tokenizer.

    With `sources`, by name, training and validation read their folders instead, and `dir` is left to evaluation and the
    tokenizer. A stage that names sources has these alone. `tokenizer` is the file or folder of another one.

    `packing` "none" puts one record into a row; "plan" puts as many as fit, and needs the index that `prepare` leaves.
    A row has `max_tiles` tile slots, a record at most `record_tiles` of them, 0: all. `loss_by` "token" gives each
    answer token the weight 1; "record" gives it to all those of a record together.

    The patch loss looks at `max_patch_labels` tokens of a patch, and at the patches of a `labelled_share` of all
    records, chosen by their ids; blank patches weigh `blank_weight`. It is a mean over a batch's labelled patches, of
    however few pages they are.

    Of the planned records, a share of `max_unsupervised` may be unreadable or without an answer that fits.
    `num_threads` threads of a process keep `prefetch` of its batches ready.
    """

    dir: str = "data/demo"
    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    tokenizer: str = ""
    split: str = "train"
    validation_split: str = "validation"
    packing: str = "none"
    row_length: int = 192
    max_tiles: int = 2
    record_tiles: int = 0
    use_overview: bool = False
    tasks: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"transcribe": 0.5, "answer": 0.5})
    loss_by: str = "token"
    max_patch_labels: int = 3
    labelled_share: float = 1.0
    blank_weight: float = 0.2
    max_unsupervised: float = 0.01
    num_threads: int = 2
    prefetch: int = 4

    @property
    def folders(self) -> tuple[str, ...]:
        """Where the records of training are, in the order of the sources' names."""
        return tuple(self.sources[name].dir for name in sorted(self.sources)) or (self.dir,)

    @property
    def tiles_of_a_record(self) -> int:
        """Tiles that all images of a record have together at most."""
        return self.record_tiles or self.max_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW after gradient clipping; linear warm-up, then a cosine down to `final_fraction` of the peak.

    `learning_rate_scale` multiplies the rate of a part of the model, by its name: vision, connector or llm.
    """

    learning_rate: float = 2e-3
    learning_rate_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warmup_steps: int = 100
    final_fraction: float = 0.05
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis.

    -1 leaves a size open: `tensor` is then as small as fits, `fsdp` as large as divides the
    parameters, and `data` all that is left (`parallel.mesh_sizes`).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage. `trainable` and `load` are regular expressions over whole parameter paths (`re.fullmatch`).

    `visual_input` is "pixels", or "labels": visual tokens are then the label-weighted average of text embeddings,
    what a perfect ALIGN would hand on, and no image is looked at. `z_loss` weighs the squared log of the sum that
    normalises a token's distribution, which keeps logits from drifting (PaLM, arXiv 2204.02311).

    Every `validate_every` steps the losses are measured on `validation_rows`, shared evenly by the sources; every
    `generate_every`, where that is not 0 and pixels are looked at, `generate_questions` of each source's validation
    split are answered and scored. The state is saved every `checkpoint_every` steps and, where that takes longer, every
    `checkpoint_minutes` (0: by steps alone).

    `profile` "100:105" traces the steps from 100 up to and not including 105, counted over the run. A process that has
    not moved for `stall_minutes` ends itself; 0: never (docs/pods.md).
    """

    num_steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    trainable: tuple[str, ...] = (".*",)
    load: tuple[str, ...] = (".*",)
    visual_input: str = "pixels"
    patch_token_weight: float = 1.0
    z_loss: float = 0.0
    log_every: int = 10
    validate_every: int = 200
    validation_rows: int = 128
    generate_every: int = 0
    generate_questions: int = 64
    checkpoint_every: int = 200
    checkpoint_minutes: float = 15.0
    keep_checkpoints: int = 2
    max_skipped_steps: int = 10
    profile: str = ""
    stall_minutes: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How answers are generated and how many questions are asked of each evaluation split."""

    splits: tuple[str, ...] = ("seen_fonts", "unseen_fonts")
    num_questions: int = 500
    batch_size: int = 100
    max_new_tokens: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One stage of a run, whole. `init_from` is another run's workdir or checkpoint to start the first stage from."""

    name: str = "run"
    stage: str = "train"
    seed: int = 0
    init_from: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def slots_per_tile(self) -> int:
        """Image slots of a tile in the stage's training rows: the model's, or where labels stand in for the connector,
        one for each patch."""
        return self.model.slots_per_tile if self.train.visual_input == "pixels" else self.model.vision.num_patches
