"""A source of tensors: a folder of safetensors shards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.source import Tensor, rows_per_chunk

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json`
    lists.

    Raises:
      UserError: files are missing, damaged, or hold other tensors than the index says.
    """

    def __init__(self, folder: Path):
        self.name = str(folder)
        self.tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for path, names in _shards(folder).items():
            with _opened(path) as shard:
                held = set(shard.keys())
                missing = sorted((names or set()) - held)
                if missing:
                    raise UserError(
                        f"{path} and {folder / INDEX} do not agree on tensor {missing[0]}"
                    )
                # What the index does not list, such as an inv_freq, is read as other tensors are;
                # what it lists in another shard is stale here.
                for name in held:
                    if name in self._files and name not in (names or held):
                        continue
                    self.tensors[name] = _describe(shard.get_slice(name))
                    self._files[name] = path

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yields a tensor in blocks of rows, as `source.Source.blocks` defines."""
        tensor = self.tensors[name]
        # The shard is opened anew for each tensor: pages that were mapped and read count as this
        # process's memory until the file is closed.
        with _opened(self._files[name]) as shard:
            if len(tensor.shape) < 2:
                yield shard.get_tensor(name)
                return
            rows = shard.get_slice(name)
            step = rows_per_chunk(tensor)
            for start in range(0, tensor.shape[0], step):
                yield rows[start : min(start + step, tensor.shape[0])]


def check_folder(folder: Path) -> None:
    """Raises UserError where a folder is no model that is read, but something else that is known:
    what it is, and what to do."""
    if (folder / "config.json").exists():
        fields = read_json(folder / "config.json")
        method = _quantisation(fields)
        # transformers loads a GGUF dequantised, and what it then saves are plain tensors beside a
        # config.json that still says "gguf", whose other fields say nothing. By other methods even
        # plain tensors may be quantised as the model runs.
        if method and not (method == "gguf" and _holds_floats_alone(folder)):
            raise UserError(
                f"{folder} is quantised ({method}), which is read from a GGUF file alone: take the "
                "folder of the weights before, in bfloat16 or float16"
            )
    elif (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{folder} is a LoRA adapter of {base or 'a model that it does not name'}: merge it "
            "into its model first (merge_and_unload of peft) and save that"
        )
    elif snapshots := sorted(folder.glob("snapshots/*")):
        raise UserError(f"{folder} is a cache of the Hugging Face hub: name {snapshots[-1]}")
    elif models := sorted(folder.glob("models--*")):
        raise UserError(
            f"{folder} is a cache of {len(models)} models of the Hugging Face hub: name one, such "
            f"as {models[0]}/snapshots/..."
        )
    elif files := sorted(folder.glob("*.gguf")):
        raise UserError(f"{folder} holds GGUF files: name one of them, such as {files[0]}")
    elif (folder / "params.json").exists():
        raise UserError(
            f"{folder} is in its publisher's own format (params.json): take the Hugging Face "
            "folder of the model, which has a config.json"
        )


def _quantisation(fields: dict[str, Any]) -> str:
    """The name of the method by which a config.json says that weights are quantised; or empty."""
    for name in ("quantization_config", "compression_config", "quantization"):
        group = fields.get(name)
        if isinstance(group, dict):
            # MLX names no method, only bits and the size of a group.
            method = group.get("quant_method", "mlx" if name == "quantization" else name)
            bits = 4 if group.get("load_in_4bit") else group.get("bits")
            return f"{method}, {bits} bits" if bits else str(method)
    return ""


def _holds_floats_alone(folder: Path) -> bool:
    """Whether no tensor is of another dtype, as packed ones are; only headers are read."""
    return all(
        tensor.dtype in DTYPES.values() for tensor in SafetensorsFolder(folder).tensors.values()
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file is missing or damaged, or holds no object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as err:
        raise UserError(f"cannot read {path}: {err.strerror}") from err
    except ValueError as err:
        raise UserError(f"{path} is damaged: {err}") from err
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return value


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Returns the files of a folder, each with the names of the tensors that the index expects in
    it, or None without an index; UserError where files are missing."""
    if (folder / INDEX).exists():
        shards: dict[Path, set[str] | None] = {}
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{folder / INDEX} is damaged: it has no weight_map")
        for name, file in weight_map.items():
            shards.setdefault(folder / file, set()).add(name)
        absent = [path.name for path in sorted(shards) if not path.exists()]
        if absent:
            raise UserError(
                f"{folder} lacks {len(absent)} of {len(shards)} shards: {', '.join(absent[:4])}"
            )
        return shards
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {pickled[0]} is pickled and is not read: save it as safetensors" if pickled else ""
    # Of several files without an index nobody knows whether one is missing.
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        hint = f"; it holds {', '.join(others[:4])}: where that is all, name it {SINGLE}"
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")


def _opened(path: Path) -> Any:
    """Returns an open shard; UserError where it is damaged."""
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as err:
        raise UserError(f"{path} is damaged or cut short: {err}") from err


def _describe(rows: Any) -> Tensor:
    # Tensors of other dtypes, such as indices, may be in the file to be ignored; with dtype void
    # the loader refuses them only where they are used.
    return Tensor(tuple(rows.get_shape()), DTYPES.get(rows.get_dtype(), np.dtype(np.void)))
