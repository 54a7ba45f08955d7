"""The decoder against an implementation of its own in NumPy float64, and who influences whom, by
gradient."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.config import LLMConfig, RopeScaling
from alignvlm_jax.models import layers
from alignvlm_jax.models.decoder import Llama
from alignvlm_jax.train import state
from tests.conftest import random_params

ROWS = 4
LENGTH = 24
# The head width is not width / heads, query heads share key heads, and eps is large enough to be
# missed.
TIED = LLMConfig(
    vocab_size=30,
    width=12,
    mlp_width=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    norm_eps=0.05,
    rope_theta=300.0,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=32
    ),
)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False, rope_scaling=RopeScaling())
BIASED = dataclasses.replace(UNTIED, qkv_bias=True)
NORMED = dataclasses.replace(TIED, qk_norm=True)
BOTH = dataclasses.replace(TIED, qkv_bias=True, qk_norm=True)
LINEAR = dataclasses.replace(TIED, rope_scaling=RopeScaling(type="linear", factor=3.0))
YARN = dataclasses.replace(
    TIED,
    rope_scaling=RopeScaling(
        type="yarn", factor=4.0, high_freq_factor=4.0, attention_factor=1.2, original_length=60
    ),
)
NOPE = dataclasses.replace(YARN, tie_embeddings=False, no_rope_every=2)


def forward(llama: Llama, tokens, positions, segment_ids):
    hidden, _ = llama(llama.embed(tokens), positions, segment_ids)
    return llama.logits(hidden)


def make(config: LLMConfig):
    """Parameters, and a compiled params, tokens, positions, segment ids -> logits."""
    llama = Llama(config, jnp.dtype("float32"), "none")
    ids = np.zeros((ROWS, LENGTH), np.int32)
    params = random_params(llama, ids, ids, ids, method=forward)
    return params, jax.jit(
        lambda params, *args: llama.apply({"params": params}, *args, method=forward)
    )


@pytest.fixture(scope="module")
def tied():
    return make(TIED)


def rope_reference(config: LLMConfig) -> np.ndarray:
    """Angular frequencies, case by case: Llama 3's on the wavelength as its model card states them,
    YaRN's on the number of the pair, between whole pairs that turn so and so often."""
    scaling = config.rope_scaling
    scaled = []
    for i in range(0, config.head_dim, 2):
        frequency = 1.0 / config.rope_theta ** (i / config.head_dim)
        wavelength = 2 * math.pi / frequency
        if scaling.type == "linear":
            scaled.append(frequency / scaling.factor)
        elif scaling.type == "yarn":
            first, last = (
                config.head_dim
                / 2
                * math.log(scaling.original_length / (2 * math.pi * turns), config.rope_theta)
                for turns in (scaling.high_freq_factor, scaling.low_freq_factor)
            )
            ramp = (i / 2 - math.floor(first)) / (math.ceil(last) - math.floor(first))
            ramp = min(max(ramp, 0.0), 1.0)
            scaled.append(frequency * (1 - ramp) + frequency / scaling.factor * ramp)
        elif scaling.factor == 1 or wavelength < scaling.original_length / scaling.high_freq_factor:
            scaled.append(frequency)
        elif wavelength > scaling.original_length / scaling.low_freq_factor:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = scaling.original_length / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(scaled)


def reference(params: dict, config: LLMConfig, tokens, positions, segment_ids) -> np.ndarray:
    """One row, token by token and head by head, in float64."""
    params = jax.tree.map(np.float64, params)
    frequencies = rope_reference(config)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotate(vector, position, layer):
        if config.no_rope_every and (layer + 1) % config.no_rope_every == 0:
            return vector
        half = config.head_dim // 2
        turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * frequencies)
        return np.concatenate([turned.real, turned.imag]) * config.rope_scaling.attention_factor

    def project(x, weights, name, head):
        y = x @ weights[name]["kernel"][:, head]
        if config.qkv_bias:
            y = y + weights[name]["bias"][head]
        if config.qk_norm and name != "v":
            y = norm(y, weights[f"{name}_norm"]["scale"])
        return y

    def attend(x, weights, layer):
        mixed = np.zeros_like(x)
        for head in range(config.num_heads):
            kv_head = head // (config.num_heads // config.num_kv_heads)
            queries = [
                rotate(q, p, layer)
                for q, p in zip(project(x, weights, "q", head), positions, strict=True)
            ]
            keys = [
                rotate(k, p, layer)
                for k, p in zip(project(x, weights, "k", kv_head), positions, strict=True)
            ]
            values = project(x, weights, "v", kv_head)
            for t in range(len(x)):
                seen = [s for s in range(t + 1) if segment_ids[s] == segment_ids[t]]
                scores = np.array([queries[t] @ keys[s] for s in seen]) / math.sqrt(config.head_dim)
                fractions = np.exp(scores - scores.max())
                mixed[t] += (
                    fractions / fractions.sum() @ values[seen] @ weights["o"]["kernel"][head]
                )
        return mixed

    x = params["embed"]["table"][tokens]
    for layer in range(config.num_layers):
        block = jax.tree.map(lambda array, layer=layer: array[layer], params["blocks"])
        x = x + attend(norm(x, block["attn_norm"]["scale"]), block["attn"], layer)
        normed = norm(x, block["mlp_norm"]["scale"])
        gate = normed @ block["mlp"]["gate"]["kernel"]
        swish = gate / (1 + np.exp(-gate))
        x = x + (swish * (normed @ block["mlp"]["up"]["kernel"])) @ block["mlp"]["down"]["kernel"]
    head = params["embed"]["table"].T if config.tie_embeddings else params["head"]["kernel"]
    return norm(x, params["final_norm"]["scale"]) @ head


def random_rows(seed: int = 0):
    """Tokens, positions and segment ids: whole rows of one segment, without padding."""
    tokens = (
        np.random.default_rng(seed).integers(0, TIED.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    )
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return tokens, positions, np.ones_like(tokens)


@pytest.mark.parametrize(
    "llm",
    [TIED, UNTIED, BIASED, NORMED, BOTH, LINEAR, YARN, NOPE],
    ids=["tied_scaled", "untied", "biased", "normed", "biased_normed", "linear", "yarn", "nope"],
)
def test_equals_float64_reference(mesh, tied, llm):
    params, logits_of = tied if llm is TIED else make(llm)
    tokens, positions, segment_ids = random_rows()
    segment_ids[1, 9:] = 2
    positions[1, 9:] = np.arange(LENGTH - 9)
    positions[2] *= 9  # distances of six times the original length of the scaling
    logits = logits_of(params, tokens, positions, segment_ids)
    assert logits.dtype == jnp.float32
    for row in range(ROWS):
        expected = reference(params, llm, tokens[row], positions[row], segment_ids[row])
        np.testing.assert_allclose(
            logits[row], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize(
    "llm", [BIASED, NORMED, BOTH, NOPE], ids=["biased", "normed", "both", "nope"]
)
def test_a_cache_changes_nothing(mesh, llm):
    """A prompt that is read at once, then the other tokens one by one."""
    params, logits_of = make(llm)
    llama = Llama(llm, jnp.dtype("float32"), "none")
    tokens, positions, segment_ids = random_rows()
    read = 9

    def step(tokens, positions, cache, mask=None):
        apply = functools.partial(llama.apply, {"params": params})
        x = apply(tokens, method=Llama.embed)
        hidden, cache = apply(x, positions, cache=cache, mask=mask)
        return apply(hidden, method=Llama.logits), cache

    cache = llama.apply({"params": params}, ROWS, LENGTH, method=Llama.empty_cache)
    logits, cache = jax.jit(step)(tokens[:, :read], positions[:, :read], cache)
    all_logits = [logits]
    step_one = jax.jit(step)
    for t in range(read, LENGTH):
        mask = np.tile(np.arange(LENGTH) <= t, (ROWS, 1, 1))
        one = slice(t, t + 1)
        logits, cache = step_one(tokens[:, one], positions[:, one], cache, mask)
        all_logits.append(logits)
    whole = logits_of(params, tokens, positions, segment_ids)
    np.testing.assert_allclose(np.concatenate(all_logits, 1), whole, atol=2e-5)


def test_options_of_other_families_leave_the_parameters_as_they_are():
    def paths(llm: LLMConfig) -> set[str]:
        params = random_params(Llama(llm, jnp.float32, "none"), *random_rows(), method=forward)
        return set(state.flatten(params))

    added = paths(BOTH) - paths(TIED)
    assert paths(TIED) < paths(BOTH)
    assert added == {
        *(f"blocks/attn/{name}/bias" for name in "qkv"),
        *(f"blocks/attn/{name}_norm/scale" for name in "qk"),
    }


def test_rope_scaling_has_three_bands():
    """The reference test above goes through each case of the scaling: kept, blended, stretched."""
    unscaled = dataclasses.replace(TIED, rope_scaling=RopeScaling())
    ratios = rope_reference(TIED) / rope_reference(unscaled)
    assert (
        ratios[0] == 1
        and ratios[-1] == pytest.approx(1 / 8)
        and ((ratios > 1 / 8) & (ratios < 1)).any()
    )
    ours = layers.rope_frequencies(TIED.head_dim, TIED.rope_theta, TIED.rope_scaling)
    np.testing.assert_allclose(ours, rope_reference(TIED), rtol=1e-6)


@pytest.mark.parametrize("llm", [LINEAR, YARN], ids=["linear", "yarn"])
def test_other_scalings_of_rope(llm):
    unscaled = dataclasses.replace(llm, rope_scaling=RopeScaling())
    ratios = rope_reference(llm) / rope_reference(unscaled)
    assert llm is LINEAR or (ratios[0] == 1 and ((ratios > 0.26) & (ratios < 0.99)).any())
    ours = layers.rope_frequencies(llm.head_dim, llm.rope_theta, llm.rope_scaling)
    np.testing.assert_allclose(ours, rope_reference(llm), rtol=1e-6)


def test_rope_is_float32_under_bfloat16():
    """bfloat16 cannot tell position 256 from 257."""
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    turned = layers.apply_rope(x, jnp.array([[256, 257]]), jnp.array([1.0, 0.1]))
    assert turned.dtype == jnp.bfloat16
    assert np.abs(np.float32(turned[0, 0] - turned[0, 1])).max() > 0.1


@pytest.mark.parametrize("llm", [TIED, UNTIED], ids=["tied", "untied"])
def test_logits_are_not_rounded_under_bfloat16(llm):
    """They are what float64 makes of the same bfloat16 operands.

    Not compiled: XLA may drop a rounding by itself.
    """
    llama = Llama(llm, jnp.bfloat16, "none")
    hidden = np.random.default_rng(0).standard_normal((1, LENGTH, llm.width)).astype(jnp.bfloat16)
    params = random_params(llama, hidden, method=Llama.logits)
    head = params["embed"]["table"].T if llm.tie_embeddings else params["head"]["kernel"]
    expected = np.float64(hidden) @ np.float64(head.astype(jnp.bfloat16))
    logits = llama.apply({"params": params}, hidden, method=Llama.logits)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_packed_segments_equal_rows_of_their_own(mesh, tied):
    params, logits_of = tied
    tokens, positions, segment_ids = random_rows(1)
    split = 10
    # row 1: the second segment by itself, then padding
    tokens[1, : LENGTH - split] = tokens[0, split:]
    segment_ids[1, LENGTH - split :] = 0
    segment_ids[0, split:] = 2
    positions[0, split:] = np.arange(LENGTH - split)
    logits = logits_of(params, tokens, positions, segment_ids)
    np.testing.assert_allclose(logits[0, split:], logits[1, : LENGTH - split], atol=1e-5)
    unpacked = logits_of(params, tokens, positions, np.where(segment_ids == 2, 0, segment_ids))
    np.testing.assert_allclose(logits[0, :split], unpacked[0, :split], atol=1e-5)


def test_padding_changes_nothing(mesh, tied):
    params, logits_of = tied
    tokens, positions, segment_ids = random_rows(2)
    used = np.arange(LENGTH) < np.array([[LENGTH], [17], [5], [1]])
    segment_ids[~used] = 0
    logits = logits_of(params, tokens, positions, segment_ids)
    tokens[~used] = 7
    positions[~used] = 0
    other = logits_of(params, tokens, positions, segment_ids)
    np.testing.assert_array_equal(np.asarray(logits)[used], np.asarray(other)[used])
    assert np.isfinite(other).all()
    assert np.abs(np.asarray(logits - other)[~used]).max() > 0.1


@pytest.fixture(scope="module")
def influence(tied):
    """params, positions, segment ids -> [B, T, S]: how strongly the input vector at S moves the
    output at T."""
    llama = Llama(TIED, jnp.dtype("float32"), "none")
    rng = np.random.default_rng(3)
    x_BTD = rng.standard_normal((ROWS, LENGTH, TIED.width)).astype(np.float32)
    direction_D = rng.standard_normal(TIED.width).astype(np.float32)

    @jax.jit
    def measure(params, positions, segment_ids):
        def scores(x_BTD):
            hidden, _ = llama.apply({"params": params}, x_BTD, positions, segment_ids)
            return (hidden @ direction_D).sum(0)  # rows are independent: their gradients do not mix

        return jnp.linalg.norm(jax.jacrev(scores)(x_BTD), axis=-1).swapaxes(0, 1)

    return lambda *args: np.asarray(measure(tied[0], *args))


def test_who_influences_whom(mesh, influence):
    """Causal within a segment, and nothing across segments or between tokens and padding."""
    _, positions, segment_ids = random_rows()
    segment_ids[1, 10:] = 2
    segment_ids[2, 15:] = 0
    segment_ids[3] = np.repeat([1, 2, 3, 0], LENGTH // 4)
    strength = influence(positions, segment_ids)
    allowed = (segment_ids[:, :, None] == segment_ids[:, None, :]) & np.tri(LENGTH, dtype=bool)
    assert (strength[~allowed] == 0).all()
    assert strength[allowed].min() > 1e-6


def test_a_mask_comes_with_its_cache(tied):
    llama = Llama(TIED, jnp.dtype("float32"), "none")
    _, positions, segment_ids = random_rows()
    x = np.zeros((ROWS, LENGTH, TIED.width), np.float32)
    mask = np.ones((ROWS, LENGTH, LENGTH), bool)
    for arguments in ((None,), (segment_ids,)):
        with pytest.raises(ValueError, match="a mask comes with the cache"):
            llama.apply({"params": tied[0]}, x, positions, *arguments, mask=mask)


def test_padded_rows_are_never_predicted():
    """Logits of the last rows are -inf; the others are as without padding."""
    padded = dataclasses.replace(TIED, padded_rows=3)
    hidden = np.random.default_rng(0).standard_normal((1, LENGTH, TIED.width)).astype(np.float32)
    params = random_params(Llama(TIED, jnp.float32, "none"), hidden, method=Llama.logits)
    logits, all_logits = (
        Llama(llm, jnp.float32, "none").apply({"params": params}, hidden, method=Llama.logits)
        for llm in (padded, TIED)
    )
    assert np.isneginf(logits[..., -3:]).all()
    np.testing.assert_array_equal(logits[..., :-3], all_logits[..., :-3])
