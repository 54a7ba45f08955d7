"""Back to the ecosystem: parameters as safetensors with the names of Hugging Face, in one of two
layouts.

    components     llm/        the class of its family, with the tokenizer's files
                   vision/     SiglipVisionModel, without its pooling head; our own names where that
                               class cannot express it
                   connector/  our own names
    transformers   one model, whose classes are in the files of `pytorch/`: llm.NAME as above, and
                   vision.NAME, connector.NAME in our own names

Both have an alignvlm.json, of `exported`. Every number is written as it is stored, but for rows
that only pad the vocabulary, which are cut off. What a family of language models cannot express is
an error.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import families
from alignvlm_jax.weights.mapping import Entry

COMPONENTS = ("llm", "vision", "connector")
LAYOUTS = ("components", "transformers")
OWN_NAMES = "alignvlm_jax"
SHARD_BYTES = 2 * 2**30

Read = Callable[[str], np.ndarray]
"""Reads one parameter by its path."""


class Component(NamedTuple):
    """How a component is written.

    Attributes:
      names: the class of transformers whose names its tensors have, or OWN_NAMES.
      fields: its config.json.
      entries: which of its tensors is which of our parameters.
      preprocessor: its preprocessor_config.json, if it has one.
    """

    names: str
    fields: dict[str, Any]
    entries: tuple[Entry, ...]
    preprocessor: dict[str, Any] | None = None


def check(config: ModelConfig, components: Iterable[str]) -> None:
    """Raises UserError where a component cannot be expressed."""
    if "llm" not in components:
        return
    try:
        families.llm_of(config.llm)
    except UserError as err:
        others = [other for other in components if other != "llm"] or COMPONENTS[1:]
        raise UserError(f"{err}; leave it out by --components={','.join(others)}") from err


def without_padding(config: ModelConfig) -> ModelConfig:
    """Returns the model without the rows that only pad its vocabulary."""
    llm = dataclasses.replace(config.llm, vocab_size=config.llm.unpadded_vocab_size, padded_rows=0)
    return dataclasses.replace(config, llm=llm)


def component_of(
    name: str, layout: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Component:
    """Returns how the component `name` of COMPONENTS is written.

    Args:
      name: as above.
      layout: of LAYOUTS.
      config: of `without_padding`.
      shapes: of every parameter by path.

    Raises:
      UserError: the LLM is of no family.
    """
    if name == "llm":
        family = families.llm_of(config.llm)
        found = Component(
            family.class_name, family.hf_config(config.llm), family.entries(config.llm)
        )
    else:
        found = _own(name, config, shapes)
        if name == "vision" and layout == "components":
            found = _published_vision(config) or found
    if layout == "transformers":
        entries = tuple(one._replace(name=f"{name}.{one.name}") for one in found.entries)
        return found._replace(entries=entries, preprocessor=None)
    return found


def _published_vision(config: ModelConfig) -> Component | None:
    try:
        family = families.vision_of(config.vision)
    except UserError:
        # Of tiles or patches that are no squares: nothing is lost in our own names.
        return None
    return Component(
        family.class_name,
        family.hf_config(config.vision),
        family.entries(),
        family.preprocessor(config.vision),
    )


def _own(name: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Component:
    """A component in our own names, with dots, and our own axes."""
    letters = "abcdefgh"
    entries = tuple(
        # Of a matrix "ab -> ab": no axis is moved.
        Entry(path, path.removeprefix(f"{name}/").replace("/", "."), f"{axes} -> {axes}")
        for path, shape in shapes.items()
        if path.startswith(f"{name}/")
        for axes in [letters[: len(shape)]]
    )
    fields = {"model_type": f"{OWN_NAMES}_{name}", **dataclasses.asdict(getattr(config, name))}
    return Component(OWN_NAMES, fields, entries)


def write(
    components: Mapping[str, Component],
    stored: Mapping[str, jax.ShapeDtypeStruct],
    read: Read,
    folder: Path,
) -> dict[str, int]:
    """Writes components into folders of their names, one parameter in memory at a time, and one
    shard of the output.

    Args:
      components: by name.
      stored: shape and dtype of every parameter by path.
      read: as above.
      folder: is there.

    Returns:
      The number of tensors written, by component.
    """
    counts = {}
    for name, component in components.items():
        (folder / name).mkdir()
        fields = component.fields | {"torch_dtype": dtype_of([component], stored)}
        write_json(folder / name / "config.json", fields)
        counts[name] = _write_tensors(folder / name, _published(component.entries, read))
        if component.preprocessor:
            write_json(folder / name / "preprocessor_config.json", component.preprocessor)
    return counts


def write_whole(components: Mapping[str, Component], read: Read, folder: Path) -> dict[str, int]:
    """Writes the tensors of all components as those of one model, and returns their number by
    component."""
    entries = (entry for component in components.values() for entry in component.entries)
    counts = dict.fromkeys(components, 0)

    def counted() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in _published(entries, read):
            counts[name.partition(".")[0]] += 1
            yield name, array

    _write_tensors(folder, counted())
    return counts


def dtype_of(components: Iterable[Component], stored: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """Returns the dtype that a config.json names: that which holds all of its tensors, which keep
    their own."""
    dtypes = {stored[entry.path].dtype for one in components for entry in one.entries}
    # Not numpy's, which knows none that holds both kinds of 16 bits.
    return str(jnp.result_type(*dtypes))


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
        save(pending, folder / f"{len(shards)}.tmp")
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
        _publish(folder / "0.tmp", folder / "model.safetensors")
        return len(shards[0])
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        _publish(folder / f"{i}.tmp", folder / file)
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return len(weight_map)


def save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file; raises UserError where there is no room for it."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as err:
        needed = sum(x.nbytes for x in tensors.values())
        # By now some of it is written: that much was free as well.
        free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0)
        raise UserError(
            f"cannot write {path}: it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free "
            f"({err})"
        ) from err


def _publish(written: Path, path: Path) -> None:
    """Gives a shard its name, and the mode of any other file that is written here."""
    # safetensors makes files that their owner alone can read, wherever they are copied.
    path.touch()
    written.chmod(path.stat().st_mode)
    written.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file as Hugging Face's look."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
