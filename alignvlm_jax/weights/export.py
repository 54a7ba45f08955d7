"""Back to the ecosystem: towers as Hugging Face folders, the connector as safetensors.

    llm/        the class of its family, with the tokenizer's files
    vision/     SiglipVisionModel, without its pooling head
    connector/  our own names, and the whole model's config

Every number is written as it is stored. What those classes cannot express is an error.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import families
from alignvlm_jax.weights.mapping import Entry

COMPONENTS = ("llm", "vision", "connector")
SHARD_BYTES = 2 * 2**30

Read = Callable[[str], np.ndarray]
"""Reads one parameter by its path."""


def check(config: ModelConfig, components: Iterable[str]) -> None:
    """Raises UserError where a part cannot be expressed."""
    finders = {
        "llm": lambda: families.llm_of(config.llm),
        "vision": lambda: families.vision_of(config.vision),
    }
    for component in finders.keys() & set(components):
        try:
            finders[component]()
        except UserError as err:
            others = ",".join(other for other in components if other != component)
            others = others or ",".join(other for other in COMPONENTS if other != component)
            raise UserError(f"{err}; leave it out by --components={others}") from err


def write(
    config: ModelConfig,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    read: Read,
    folder: Path,
    components: Iterable[str],
) -> dict[str, int]:
    """Writes the parts of a model into `folder`, one parameter in memory at a time, and one shard
    of the output.

    Args:
      stored: shape and dtype of every parameter by path.

    Returns:
      The number of tensors written, by part.
    """

    def llm() -> tuple[dict[str, Any], tuple[Entry, ...]]:
        family = families.llm_of(config.llm)
        return family.hf_config(config.llm), family.entries(config.llm)

    def vision() -> tuple[dict[str, Any], tuple[Entry, ...]]:
        family = families.vision_of(config.vision)
        return family.hf_config(config.vision), family.entries()

    def connector() -> tuple[dict[str, Any], tuple[Entry, ...]]:
        return _connector_config(config), _connector_entries(stored)

    writers = {"llm": llm, "vision": vision, "connector": connector}
    counts = {}
    for component in components:
        fields, entries = writers[component]()
        (folder / component).mkdir(parents=True)
        dtypes = {stored[entry.path].dtype for entry in entries}
        # A config.json names one dtype: that which holds all others. Tensors keep their own.
        fields["torch_dtype"] = str(np.result_type(*dtypes))
        _write_json(folder / component / "config.json", fields)
        counts[component] = _write_tensors(folder / component, _published(entries, read))
    if "vision" in components:
        preprocessor = families.vision_of(config.vision).preprocessor(config.vision)
        _write_json(folder / "vision" / "preprocessor_config.json", preprocessor)
    return counts


def _published(entries: Iterable[Entry], read: Read) -> Iterator[tuple[str, np.ndarray]]:
    for entry in entries:
        # A stacked parameter is read once, and handed on a layer at a time.
        array = read(entry.path)
        for name, view in zip(entry.names(array.shape), entry.views(array), strict=True):
            yield name, np.ascontiguousarray(view)


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> int:
    """Writes shards of at most SHARD_BYTES, or of one tensor; an index where they are several.

    Returns their number.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        # The number of shards, which their names hold, is known at the end.
        save_file(pending, folder / f"{len(shards)}.tmp", metadata={"format": "pt"})
        # The names alone: the arrays are written, and can go.
        shards.append(list(pending))
        pending.clear()

    for name, array in tensors:
        # A tensor larger than a shard gets one to itself.
        if pending and sum(x.nbytes for x in pending.values()) + array.nbytes > SHARD_BYTES:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.tmp").rename(folder / "model.safetensors")
        return len(shards[0])
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / f"{i}.tmp").rename(folder / file)
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return len(weight_map)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _connector_config(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "alignvlm_jax_connector", "model": dataclasses.asdict(config)}


def _connector_entries(stored: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[Entry, ...]:
    """Returns the table of the connector: our own names, with dots, and our own axes."""
    letters = "abcdefgh"
    return tuple(
        # Of a matrix "ab -> ab": no axis is moved.
        Entry(path, path.removeprefix("connector/").replace("/", "."), f"{axes} -> {axes}")
        for path, x in stored.items()
        if path.startswith("connector/")
        for axes in [letters[: len(x.shape)]]
    )
