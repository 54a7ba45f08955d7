"""What fields may hold: choices, bounds, and every check between fields, with the numbers in the
message."""

import dataclasses
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

from alignvlm_jax.config import model_checks, renamed
from alignvlm_jax.config.fields import (
    Config,
    DataConfig,
    LoraConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from alignvlm_jax.config.model import MISSING, LLMConfig, ModelConfig, VisionConfig
from alignvlm_jax.config.options import connector_class
from alignvlm_jax.errors import UserError, nearest, stage_flag

COMPONENTS = ("vision", "connector", "llm")

SAVED_NAMES = ("attention", "qkv", "mlp")
"""What of a layer `model.remat` can save by its name (`models.layers.REMAT_POLICIES`)."""
SAVED_BY_NAME = tuple(
    "+".join(names)
    for count in range(1, len(SAVED_NAMES) + 1)
    for names in itertools.permutations(SAVED_NAMES, count)
)

CHOICES = {
    "model.vision.gelu": ("tanh", "exact"),
    "model.llm.rope_scaling.type": ("llama3", "linear", "yarn"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots", *SAVED_BY_NAME),
    "model.vocab_impl": ("auto", "plain", "chunked"),
    "model.attention": ("auto", "xla", "cudnn", "splash", "triton"),
    "optim.name": ("adamw", "adafactor", "muon"),
    "optim.moment_dtype": ("float32", "bfloat16"),
    "data.packing": ("none", "offline"),
    "data.tiling": ("grid", "lines"),
    "data.text_unit": ("token", "letter"),
    "data.label_unit": ("token", "character", "letter"),
    "data.loss_normalisation": ("token", "answer", "record"),
    "train.grad_reduce_dtype": ("bfloat16", "float32"),
    "train.visual_source": ("pixels", "oracle"),
}

AT_LEAST: dict[str, int] = {
    "seed": 0,
    # Every int of a tower; an entry with another bound replaces this one, and has to follow it.
    **{
        f"model.{tower}.{field.name}": 1
        for tower, cls in (("vision", VisionConfig), ("llm", LLMConfig))
        for field in dataclasses.fields(cls)
        if field.type is int
    },
    "model.llm.padded_rows": 0,
    "model.llm.no_rope_every": 0,
    "model.llm.context_length": 0,
    "model.scan_unroll": 1,
    "model.llm.rope_scaling.original_length": 1,
    "data.max_tiles": 1,
    "data.record_tiles": 0,
    "data.records_per_sequence": 1,
    "data.max_patch_labels": 1,
    "data.blank_weight": 0,
    "data.min_token_height": 0,
    "data.min_contrast": 0,
    "data.blank_contrast": 0,
    "data.labelled_fraction": 0,
    "data.label_slope": 0,
    "data.max_unsupervised": 0,
    "data.num_threads": 1,
    "data.prefetch": 1,
    "optim.warmup_steps": 0,
    "optim.final_fraction": 0,
    "optim.b1": 0,
    "optim.b2": 0,
    "optim.weight_decay": 0,
    "lora.rank": 0,
    "train.num_steps": 1,
    "train.batch_size": 1,
    "train.num_records": 0,
    "train.answer_weight": 0,
    "train.sampled_entries": 0,
    "train.patch_token_weight": 0,
    "train.z_loss": 0,
    "train.log_every": 1,
    "train.validate_every": 1,
    "train.validation_sequences": 1,
    "train.generate_every": 0,
    "train.generate_questions": 1,
    "train.checkpoint_every": 1,
    "train.checkpoint_minutes": 0,
    "train.keep_checkpoints": 1,
    "train.max_skipped_steps": 0,
    "train.stall_minutes": 0,
    "eval.num_questions": 1,
    "eval.batch_size": 1,
    "eval.max_new_tokens": 1,
}
ABOVE = {
    "model.vision.norm_eps": 0,
    "model.chunk_size_mib": 0,
    "model.llm.norm_eps": 0,
    "model.llm.rope_theta": 0,
    "model.llm.rope_scaling.factor": 0,
    "model.llm.rope_scaling.attention_factor": 0,
    "data.temperature": 0,
    "data.full_cover": 0,
    "lora.alpha": 0,
    "optim.learning_rate": 0,
    "optim.eps": 0,
    "optim.clip_norm": 0,
}
BELOW = {"optim.b1": 1, "optim.b2": 1}
AT_MOST = {"data.labelled_fraction": 1, "data.label_slope": 1, "data.blank_contrast": 255}
MAX_BFLOAT16_DECAY = 0.99
USUALLY = {
    "model.vision": 'set_preset(config.model.vision, presets.VISION["..."])',
    "model.llm": 'set_preset(config.model.llm, presets.LLM["..."])',
    "model": "the tokenizer's <image>, or llm.vocab_size",
}
"""What usually gives the fields of a group that have no default."""
BOUNDS = (
    ("at least", operator.ge, AT_LEAST),
    ("above", operator.gt, ABOVE),
    ("below", operator.lt, BELOW),
    ("at most", operator.le, AT_MOST),
)


def check(config: Config) -> Config:
    """Returns `config`, or raises UserError for fields missing, or impossible alone or together."""
    # First: a field without a value would fail every comparison below, by a name of Python's.
    _check_given(config.stage, tuple(_missing(config, "")))
    for path, choices in CHOICES.items():
        value = operator.attrgetter(path)(config)
        if value not in choices:
            known = renamed.value_hint(path, value) or nearest(str(value), choices)
            raise UserError(f"config.{path} is {value!r}{known}")
    for words, holds, bounds in BOUNDS:
        for path, bound in bounds.items():
            value = operator.attrgetter(path)(config)
            # NaN holds to no bound, and is refused here, too.
            if not holds(value, bound):
                raise UserError(f"config.{path} is {value}; it must be {words} {bound}")
    model_checks.check(config.model)
    _check_data(config.data, config.model.vision, config.tokens_per_tile)
    _check_blank(config.data, config.model)
    train = config.train
    model_checks.divides(
        "train.batch_size", train.batch_size, "grad_accum_steps", train.grad_accum_steps
    )
    _check_optim(config.optim)
    _check_lora(config.lora, config.optim)
    _check_losses(train, config.model, config.stage)
    if train.offload_optimizer and not train.jit:
        raise UserError("config.train.offload_optimizer needs config.train.jit, which is False")
    _check_profile(train.profile)
    if not config.eval.splits:
        raise UserError("config.eval.splits is empty; name at least one split")
    return config


def _check_given(stage: str, missing: Sequence[str]) -> None:
    """Refuses a stage that lacks what has no default, all of it in one line."""
    by_group: dict[str, list[str]] = {}
    for path in missing:
        group, _, name = path.rpartition(".")
        by_group.setdefault(group, []).append(name)
    if not by_group:
        return
    parts = []
    for group, names in by_group.items():
        fields = names[0] if len(names) == 1 else f"{{{', '.join(names)}}}"
        usually = f" (usually {USUALLY[group]})" if group in USUALLY else ""
        parts.append(f"config.{group}.{fields}{usually}")
    raise UserError(
        f"stage {stage!r} lacks {', '.join(parts)}; such fields have no default: set them "
        "in the config file, or as --config.a.b=VALUE"
    )


def _missing(value: Any, path: str) -> Iterator[str]:
    """Yields the paths of the fields below `value` that have no default and no value."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from _missing(inner, f"{path}{field.name}.")
        elif field.default is MISSING and inner is MISSING:
            yield f"{path}{field.name}"


def _check_data(data: DataConfig, vision: VisionConfig, tokens_per_tile: int) -> None:
    tiles = "tiles"
    if data.blank_contrast:
        # What they are at least: one stays of each row of patches.
        tiles = "blank tiles"
        tokens_per_tile = vision.patch_grid[0]
    image_tokens = data.max_tiles * tokens_per_tile
    # As many tiles as a sequence may have must leave a token of text, or no answer would fit.
    if image_tokens >= data.seq_len:
        raise UserError(
            f"config.data.seq_len {data.seq_len} leaves no room for text: {data.max_tiles} "
            f"{tiles} are {image_tokens} image tokens; make it larger than {image_tokens} or lower "
            "data.max_tiles"
        )
    if not data.tasks or min(data.tasks.values()) < 0 or sum(data.tasks.values()) <= 0:
        raise UserError(f"config.data.tasks {dict(data.tasks)} has no positive weight")
    if data.record_tiles > data.max_tiles:
        raise UserError(
            f"config.data.record_tiles is {data.record_tiles}; a packed sequence has "
            f"config.data.max_tiles {data.max_tiles} of them"
        )
    if data.tiling == "lines" and data.use_overview:
        raise UserError("config.data.tiling 'lines' has no overview; leave use_overview out")
    # An index has the sizes of pages and not their lines, and the tokens of answers as they are.
    unplanned = {
        "tiling": data.tiling == "lines",
        "blank_contrast": data.blank_contrast > 0,
        "text_unit": data.text_unit == "letter",
    }
    for name, is_set in unplanned.items():
        if is_set and data.packing == "offline":
            value = getattr(data, name)
            raise UserError(
                f"config.data.{name} {value!r} cannot be planned; packing must be 'none'"
            )
    if data.records_per_sequence > 1 and (data.packing != "none" or data.sources):
        why = f"packing {data.packing!r}" if data.packing != "none" else "sources"
        raise UserError(
            f"config.data.records_per_sequence {data.records_per_sequence} is of one folder with "
            f"packing 'none', and not with config.data.{why}; leave it 1"
        )
    for name, source in data.sources.items():
        _check_source(f"config.data.sources.{name}", name, source)
    if data.sources and not any(source.weight for source in data.sources.values()):
        raise UserError(
            f"config.data.sources {', '.join(data.sources)}: one of them needs a weight above 0"
        )


def _check_blank(data: DataConfig, model: ModelConfig) -> None:
    """Refuses to leave blank patches out where image tokens are no patches."""
    if not data.blank_contrast:
        return
    if not connector_class(model.connector.name).has_patch_tokens():
        raise UserError(
            f"config.data.blank_contrast is {data.blank_contrast}, and connector "
            f"{model.connector.name!r} makes {model.tokens_per_tile} visual tokens of the "
            f"{model.vision.num_patches} patches of a tile: none of them is a patch's; 0 keeps all"
        )


def _check_source(path: str, name: str, source: SourceConfig) -> None:
    if not re.fullmatch(r"\w+", name):  # It becomes part of the names of flags and metrics.
        raise UserError(f"{path}: a source's name is made of letters, digits and underscores")
    if not source.dir:
        raise UserError(f"{path}.dir is empty; name the folder that `prepare` wrote")
    if source.weight < 0:
        raise UserError(f"{path}.weight is {source.weight}; it must be at least 0")
    if source.repeat <= 0:
        raise UserError(f"{path}.repeat is {source.repeat}; it must be above 0")
    if source.cap < 0:
        raise UserError(f"{path}.cap is {source.cap}; it must be at least 0")


def _check_optim(optim: OptimConfig) -> None:
    components = (*COMPONENTS, "lora")
    for component, scale in optim.learning_rate_scale.items():
        if component not in components:
            raise UserError(
                f"config.optim.learning_rate_scale.{component} is no component of the "
                f"model{nearest(component, components)}"
            )
        if scale < 0:
            raise UserError(
                f"config.optim.learning_rate_scale.{component} is {scale}; it must be at least 0"
            )
    if optim.moment_dtype == "float32":
        return
    if optim.name != "adamw":
        raise UserError(
            f"config.optim.moment_dtype {optim.moment_dtype!r} is of adamw's running means "
            f"alone, and config.optim.name is {optim.name!r}; leave it out"
        )
    # A bfloat16 has 8 bits: a mean that is to lose less than 1/256 of itself would stay for ever.
    if optim.b2 > MAX_BFLOAT16_DECAY:
        raise UserError(
            f"config.optim.b2 is {optim.b2}; with moment_dtype 'bfloat16' it must be at most "
            f"{MAX_BFLOAT16_DECAY}, since bfloat16 rounds smaller changes away"
        )


def _check_lora(lora: LoraConfig, optim: OptimConfig) -> None:
    if not lora.rank and optim.learning_rate_scale.get("lora", 1.0) != 1.0:
        raise UserError(
            "config.optim.learning_rate_scale.lora changes nothing: config.lora.rank is 0"
        )
    if lora.rank and not lora.targets:
        raise UserError(
            f"config.lora.rank is {lora.rank} and config.lora.targets is empty; name kernels, such "
            "as 'llm/.*/attn/(q|v)/kernel'"
        )


def _check_losses(train: TrainConfig, model: ModelConfig, stage: str) -> None:
    """Refuses a stage without a loss, and a sample of entries that it cannot use."""
    num_entries = model.llm.unpadded_vocab_size
    if train.answer_weight and train.sampled_entries:
        why = f"sampled_entries is {train.sampled_entries}, of use with answer_weight 0 alone"
    elif train.answer_weight:
        return
    elif train.visual_source != "pixels":
        why = f"answer_weight is 0, and visual_source {train.visual_source!r} has no patch loss"
    elif not train.patch_token_weight:
        why = "answer_weight is 0, and so is patch_token_weight: there is no loss"
    elif not connector_class(model.connector.name).has_patch_loss():
        why = f"answer_weight is 0, and {model.connector.name!r} has no patch loss"
    elif train.sampled_entries > num_entries:
        why = f"sampled_entries is {train.sampled_entries}; the vocabulary has {num_entries}"
    else:
        return
    flag = stage_flag(stage, "train.answer_weight")
    cure = f"; {flag}=1 adds another" if "loss" in why else ""
    raise UserError(f"config.train.{why}{cure}")


def _check_profile(profile: str) -> None:
    if not profile:
        return
    found = re.fullmatch(r"(\d+):(\d+)", profile)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(
            f"config.train.profile is {profile!r}; it must be FIRST:END, steps from FIRST up to "
            "and not including END, such as '100:105'"
        )
