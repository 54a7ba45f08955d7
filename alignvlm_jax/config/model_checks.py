"""Checks of the model's sizes and of its connector's options."""

from alignvlm_jax.config import options
from alignvlm_jax.config.model import LLMConfig, ModelConfig, VisionConfig
from alignvlm_jax.config.options import connector_class
from alignvlm_jax.errors import UserError


def check(model: ModelConfig) -> None:
    """Raises UserError where sizes do not divide, or the connector refuses its options."""
    # Towers first: connectors look at their sizes.
    _check_vision(model.vision)
    _check_llm(model.llm)
    _check_connector(model)


def _check_vision(vision: VisionConfig) -> None:
    divides("model.vision.tile_height", vision.tile_height, "patch_height", vision.patch_height)
    divides("model.vision.tile_width", vision.tile_width, "patch_width", vision.patch_width)
    divides("model.vision.width", vision.width, "num_heads", vision.num_heads)
    for name in ("pixel_mean", "pixel_std"):
        values = getattr(vision, name)
        if len(values) != 3 or (name == "pixel_std" and min(values) <= 0):
            above = " above 0" if name == "pixel_std" else ""
            raise UserError(
                f"config.model.vision.{name} is {values}; it must be three numbers{above}"
            )


def _check_llm(llm: LLMConfig) -> None:
    divides("model.llm.num_heads", llm.num_heads, "num_kv_heads", llm.num_kv_heads)
    if llm.rope_scaling.low_freq_factor >= llm.rope_scaling.high_freq_factor:
        raise UserError(
            f"config.model.llm.rope_scaling.low_freq_factor {llm.rope_scaling.low_freq_factor} "
            f"must be below high_freq_factor {llm.rope_scaling.high_freq_factor}"
        )
    # Channels rotate in pairs.
    if llm.head_dim % 2:
        raise UserError(
            f"config.model.llm.head_dim is {llm.head_dim}; rotary embedding needs an even number"
        )
    if llm.unpadded_vocab_size < 1:
        raise UserError(
            f"config.model.llm.padded_rows {llm.padded_rows} leaves no word of vocab_size "
            f"{llm.vocab_size}"
        )


def _check_connector(model: ModelConfig) -> None:
    """Raises UserError where options are not of their types, or the connector refuses them."""
    connector = connector_class(model.connector.name)
    # Options of another connector may have the same names, and would be taken for this one's.
    if type(model.connector) is not connector.Options:
        raise TypeError(
            f"{model.connector} are not the options of {connector}: make them by "
            "config.connector(name)"
        )
    options.check(model.connector)
    connector.check(model.vision, model.llm, model.connector)


def divides(path: str, size: int, divisor_name: str, divisor: int) -> None:
    """Raises UserError, with the nearest divisor, where a size is no multiple of a divisor."""
    if divisor < 1 or size % divisor:
        best = nearest_divisor(size, divisor)
        raise UserError(
            f"config.{path} {size} is not a multiple of {divisor_name} {divisor}; nearest that "
            f"divides: {best}"
        )


def nearest_divisor(size: int, wanted: int) -> int:
    """Returns the divisor of `size` that is nearest to `wanted`."""
    # All of them: sizes are at most a few hundred thousand, and this is said once.
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted), default=1)
