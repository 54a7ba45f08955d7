"""Typed configuration: frozen dataclasses, the one reader of ConfigDict, and every check between fields.

A config file gives a ConfigDict (`default_config_dict()` plus changes). `from_config_dict` turns it into a tuple of
`Config`, one for each stage: a curriculum is a base and, under `stages`, named differences from it. Stages run in the
order of their names: a ConfigDict keeps its keys sorted and knows no other.
"""

import dataclasses
import math
import operator
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from alignvlm_jax.errors import UserError, nearest


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
class ConnectorConfig:
    """The connector, by its name in `models.connectors`. Fields below `name` belong to ALIGN (arXiv 2502.01341)."""

    name: str = "align"
    use_ln2: bool = True
    ln2_gain_init: float = 1.0
    w2_init: str = "lm_head"
    embed_grad: str = "live"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. `dtype` is that of the computation; parameters are float32.

    `image_token_id` marks the image slots in a row of tokens; it must be the tokenizer's. `scan_unroll` layers of a
    tower are compiled in a row: 1 for large models; all of them make a small one a third faster on CPU. `attention` is
    the kernel of training and of the vision tower, "auto": splash on TPU, cudnn on GPU in bfloat16, else xla. What lies
    over the vocabulary, ALIGN and the loss, is computed whole (`vocab_form` "plain"), or a block of rows at a time
    ("blockwise"), of at most `vocab_block_mib` MiB of logits on a device; "auto" is blockwise where they are more.
    """

    vision: VisionConfig = VisionConfig()
    llm: LLMConfig = LLMConfig()
    connector: ConnectorConfig = ConnectorConfig()
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
        return self.vision.num_patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a row is made of. `dir` holds what `prepare` wrote: shards by split and `tokenizer.model`.

    `tokenizer` is the file or folder of another tokenizer, as `convert` leaves it. `num_threads` threads of a process
    keep `prefetch` of its batches ready.
    """

    dir: str = "data/demo"
    tokenizer: str = ""
    split: str = "train"
    validation_split: str = "validation"
    row_length: int = 192
    max_tiles: int = 2
    use_overview: bool = False
    tasks: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"transcribe": 0.5, "answer": 0.5})
    max_patch_labels: int = 3
    blank_weight: float = 0.2
    max_unsupervised: float = 0.01
    num_threads: int = 2
    prefetch: int = 4


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
    """Devices along each mesh axis; one of them may be -1: all that is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage. `trainable` and `load` are regular expressions over whole parameter paths (`re.fullmatch`).

    `visual_input` is "pixels", or "labels": visual tokens are then the label-weighted average of text embeddings,
    what a perfect ALIGN would hand on, and no image is looked at. `z_loss` weighs the squared log of the sum that
    normalises a token's distribution, which keeps logits from drifting (PaLM, arXiv 2204.02311).
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
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    max_skipped_steps: int = 10


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
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


PARTS = ("vision", "connector", "llm")

CHOICES = {
    "model.vision.gelu": ("tanh", "exact"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "model.vocab_form": ("auto", "plain", "blockwise"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "model.connector.w2_init": ("lm_head", "random"),
    "model.connector.embed_grad": ("live", "stop"),
    "train.visual_input": ("pixels", "labels"),
}

AT_LEAST: dict[str, int] = {
    "seed": 0,
    **{
        f"model.{part}.{field.name}": 1
        for part, cls in (("vision", VisionConfig), ("llm", LLMConfig))
        for field in dataclasses.fields(cls)
        if field.type is int
    },
    "model.llm.padded_rows": 0,
    "model.scan_unroll": 1,
    "model.llm.rope_scaling.original_length": 1,
    "data.max_tiles": 1,
    "data.max_patch_labels": 1,
    "data.blank_weight": 0,
    "data.max_unsupervised": 0,
    "data.num_threads": 1,
    "data.prefetch": 1,
    "optim.warmup_steps": 0,
    "optim.final_fraction": 0,
    "optim.b1": 0,
    "optim.b2": 0,
    "optim.weight_decay": 0,
    "train.num_steps": 1,
    "train.batch_size": 1,
    "train.patch_token_weight": 0,
    "train.z_loss": 0,
    "train.log_every": 1,
    "train.validate_every": 1,
    "train.validation_rows": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "train.max_skipped_steps": 0,
    "eval.num_questions": 1,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
}
ABOVE = {
    "model.vision.norm_eps": 0,
    "model.vocab_block_mib": 0,
    "model.llm.norm_eps": 0,
    "model.llm.rope_theta": 0,
    "model.llm.rope_scaling.factor": 0,
    "optim.learning_rate": 0,
    "optim.eps": 0,
    "optim.clip_norm": 0,
}
BELOW = {"optim.b1": 1, "optim.b2": 1}
BOUNDS = (("at least", operator.ge, AT_LEAST), ("above", operator.gt, ABOVE), ("below", operator.lt, BELOW))


def default_config_dict() -> ml_collections.ConfigDict:
    """Returns every field with its default, and an empty `stages`, for config files to change."""
    fields = dataclasses.asdict(Config())
    del fields["stage"]
    return ml_collections.ConfigDict({**fields, "stages": {}})


def set_preset(fields: ml_collections.ConfigDict, preset: Any) -> None:
    """Writes a preset's dataclass over the fields of a part of a ConfigDict."""
    fields.update(dataclasses.asdict(preset))


def from_config_dict(config_dict: Mapping[str, Any]) -> tuple[Config, ...]:
    """Returns the stages of a run, checked.

    Raises:
      UserError: an unknown or ill-typed field, or fields that contradict each other.
    """
    base = _plain(config_dict)
    stages = base.pop("stages", {}) or {"train": {}}
    for name, changes in stages.items():
        if not isinstance(changes, Mapping):
            raise UserError(f"config.stages.{name} is {changes!r}; it must be a group of fields")
    return tuple(
        check(_build(Config, _merge(base, {**changes, "stage": name}), "")) for name, changes in sorted(stages.items())
    )


def to_json(stages: tuple[Config, ...]) -> list[dict[str, Any]]:
    """Returns the stages as plain values, as `config.json` holds them."""
    return [dataclasses.asdict(stage) for stage in stages]


def from_json(stages: list[dict[str, Any]]) -> tuple[Config, ...]:
    """The inverse of `to_json`."""
    return tuple(check(_build(Config, stage, "")) for stage in stages)


def check(config: Config) -> Config:
    """Returns `config`, or raises UserError for fields that are impossible, alone or together."""
    for path, choices in CHOICES.items():
        value = _get(config, path)
        if value not in choices:
            raise UserError(f"config.{path} is {value!r}{nearest(str(value), choices)}")
    for words, holds, bounds in BOUNDS:
        for path, bound in bounds.items():
            if not holds(_get(config, path), bound):
                raise UserError(f"config.{path} is {_get(config, path)}; it must be {words} {bound}")
    vision, llm, data, train = config.model.vision, config.model.llm, config.data, config.train
    _check_divides("model.vision.tile_height", vision.tile_height, "patch_height", vision.patch_height)
    _check_divides("model.vision.tile_width", vision.tile_width, "patch_width", vision.patch_width)
    _check_divides("model.vision.width", vision.width, "num_heads", vision.num_heads)
    _check_divides("model.llm.num_heads", llm.num_heads, "num_kv_heads", llm.num_kv_heads)
    _check_divides("train.batch_size", train.batch_size, "accumulation", train.accumulation)
    for name in ("pixel_mean", "pixel_std"):
        values = getattr(vision, name)
        if len(values) != 3 or (name == "pixel_std" and min(values) <= 0):
            above = " above 0" if name == "pixel_std" else ""
            raise UserError(f"config.model.vision.{name} is {values}; it must be three numbers{above}")
    if llm.rope_scaling.low_freq_factor >= llm.rope_scaling.high_freq_factor:
        raise UserError(
            f"config.model.llm.rope_scaling.low_freq_factor {llm.rope_scaling.low_freq_factor} must be below "
            f"high_freq_factor {llm.rope_scaling.high_freq_factor}"
        )
    if llm.head_dim % 2:
        raise UserError(f"config.model.llm.head_dim is {llm.head_dim}; rotary embedding needs an even number")
    if llm.num_words < 1:
        raise UserError(f"config.model.llm.padded_rows {llm.padded_rows} leaves no word of vocab_size {llm.vocab_size}")
    slots = data.max_tiles * config.model.slots_per_tile
    if slots >= data.row_length:
        raise UserError(
            f"config.data.row_length {data.row_length} leaves no room for text: {data.max_tiles} tiles take "
            f"{slots} slots; make it larger than {slots} or lower data.max_tiles"
        )
    if not data.tasks or min(data.tasks.values()) < 0 or sum(data.tasks.values()) <= 0:
        raise UserError(f"config.data.tasks {dict(data.tasks)} has no positive weight")
    for part, scale in config.optim.learning_rate_scale.items():
        if part not in PARTS:
            raise UserError(f"config.optim.learning_rate_scale.{part} is no part of the model{nearest(part, PARTS)}")
        if scale < 0:
            raise UserError(f"config.optim.learning_rate_scale.{part} is {scale}; it must be at least 0")
    if not config.eval.splits:
        raise UserError("config.eval.splits is empty; name at least one split")
    return config


def _check_divides(path: str, size: int, part_name: str, part: int) -> None:
    if part < 1 or size % part:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        best = min(divisors, key=lambda d: abs(d - part), default=1)
        raise UserError(f"config.{path} {size} is not a multiple of {part_name} {part}; nearest that divides: {best}")


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _plain(value: Any) -> Any:
    """ConfigDicts and FieldReferences to plain dicts, depth first."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it; mappings below merge, but a task mixture is replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "tasks"
        merged[key] = _merge(merged[key], value) if deeper else value
    return merged


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """Builds dataclass `cls` from a mapping; unknown keys and wrong types are errors that name the field."""
    hints = typing.get_type_hints(cls)
    fields = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"unknown config field config.{path}{key}{nearest(key, hints)}")
        fields[key] = _convert(hints[key], value, f"{path}{key}")
    return cls(**fields)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config.{path} is {value!r}; it must be a group of fields")
        return _build(hint, value, f"{path}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path} is {value}; it must be a finite number")
    if origin or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"config.{path} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}")
    return value
