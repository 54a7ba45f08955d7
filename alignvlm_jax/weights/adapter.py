"""LoRA's factors of the language model as an adapter of PEFT, for the exported `llm/` without them:

adapter/adapter_config.json
adapter/adapter_model.safetensors    base_model.model.NAME.lora_A.weight [rank, in], ... lora_B
                                     [out, rank]
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import lora
from alignvlm_jax.weights import families
from alignvlm_jax.weights.mapping import Entry

FOLDER = "adapter"
PREFIX = "base_model.model."


def check(config: ModelConfig, stored: Collection[str], components: Collection[str]) -> None:
    """Raises UserError where a checkpoint of the parameters `stored` has no factors of the LLM, or
    an adapter cannot express them, or the LLM is not exported beside it."""
    if "llm" not in components:
        raise UserError(f"--adapter is for the language model; add llm to {','.join(components)}")
    found = {path for path in lora.kernels(stored) if path.startswith("llm/")}
    if not found:
        raise UserError(
            "--adapter: the checkpoint has no LoRA factors of the language model (config.lora); "
            "leave it out"
        )
    if config.llm.padded_rows and "llm/head/kernel" in found:
        raise UserError("--adapter: the head has padded rows (padded_rows); leave --adapter out")
    named = {entry.path for entry in families.llm_of(config.llm).entries(config.llm)}
    if unnamed := sorted(found - named):
        raise UserError(f"--adapter: {unnamed[0]} is no tensor of its own there; leave it out")


def write(
    config: ModelConfig,
    alpha: float,
    stored: Collection[str],
    read: Callable[[str], np.ndarray],
    folder: Path,
) -> int:
    """Writes the adapter of a checkpoint that `check` takes into a new folder.

    Args:
      config: of the model.
      alpha: of the run's `config.lora`.
      stored: the paths of its parameters.
      read: reads one of them, as it is stored.
      folder: must not exist.

    Returns:
      The number of tensors.
    """
    with_factors = lora.kernels(stored)
    entries = families.llm_of(config.llm).entries(config.llm)
    tensors = {}
    modules = set()
    rank = 0
    for entry in entries:
        if entry.path not in with_factors:
            continue
        modules.add(entry.name.removesuffix(".weight").split(".")[-1])
        layout = lora.layouts(config)[entry.path]
        for factor in _factor_entries(entry, layout):
            array = read(factor.path).astype(np.float32)
            # All have one: the factors of other ranks were merged when the stage began.
            rank = array.shape[-1] if factor.path.endswith("/a") else rank
            for name, view in zip(factor.names(array.shape), factor.views(array), strict=True):
                tensors[name] = np.ascontiguousarray(view)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../llm",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        # Last names: peft gives factors to every module that ends so, and to no other tensor here.
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return len(tensors)


def _factor_entries(entry: Entry, layout: lora.Layout) -> tuple[Entry, Entry]:
    """The factors of a kernel as PEFT has them, by the kernel's own entry: of "DHh -> (Hh)D" they
    are "Dr -> rD" and "rHh -> (Hh)r"."""
    rank = layout.rank
    # PyTorch's weights are [out, in]; each is one axis there, of one or several of ours.
    out, inputs = _terms(entry.equation.split(" -> ")[1])
    if set(inputs.strip("()")) != set(layout.summed):
        raise UserError(f"--adapter: {entry.path} lies as {entry.equation!r} there; leave it out")
    a, b = lora.factors(entry.path)
    name = PREFIX + entry.name.removesuffix(".weight")
    return (
        Entry(a, f"{name}.lora_A.weight", f"{layout.summed}{rank} -> {rank}{inputs}"),
        Entry(b, f"{name}.lora_B.weight", f"{rank}{layout.kept} -> {out}{rank}"),
    )


def _terms(theirs: str) -> tuple[str, str]:
    """Splits "(Hh)D" into "(Hh)" and "D"."""
    end = theirs.index(")") + 1 if theirs.startswith("(") else 1
    return theirs[:end], theirs[end:]
