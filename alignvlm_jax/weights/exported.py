"""An exported model: what its alignvlm.json says, and the folder read as a checkpoint is."""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, pdf, tokenizers
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.shapes import Array
from alignvlm_jax.train import restore, state
from alignvlm_jax.train.state import Params
from alignvlm_jax.weights import export, families, load
from alignvlm_jax.weights.formats.safetensors_folder import SafetensorsFolder, read_json
from alignvlm_jax.weights.source import Tower

T = TypeVar("T")

FILE = "alignvlm.json"
FORMAT_VERSION = 1
"""Of FILE; raise it when an older one can no longer be read."""
PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
PRIVATE = re.compile(r"^[/~.]|://")
"""What in a description of the data is a place on somebody's machine."""


class SpecialIds(NamedTuple):
    """Tokens that other programs want to know.

    Attributes:
      bos: begins every text, where there is such a token.
      eos: those at which generation stops.
      pad: fills batches.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int

    def fields(self) -> dict[str, Any]:
        """Returns them as config.json and generation_config.json name them."""
        return {
            "bos_token_id": self.bos,
            "eos_token_id": list(self.eos),
            "pad_token_id": self.pad,
        }


def special_ids(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> SpecialIds:
    """Returns the special tokens of a model by its tokenizer and the `files` of that."""
    known = tokenizer.special_tokens
    named = tokenizers.named_tokens(files)
    eos = chat.stop_ids(tokenizer)
    begin = [known[named["bos_token"]]] if named.get("bos_token") in known else None
    begin = begin or chat.begin_ids(tokenizer)
    # Any token would do, since what is filled up is masked: one that ends answers is no text.
    names = (named.get("pad_token"), *PAD_TOKENS)
    pad = next((known[name] for name in names if name in known), eos[0])
    return SpecialIds(begin[0] if begin else None, eos, pad)


def pdf_dpi(metadata: Mapping[str, Any]) -> float:
    """Returns the pixels an inch at which the PDFs were drawn that a model was trained on; where
    there were none, or nothing tells, `pdf.DPI`."""
    drawn = [one["dpi"] for one in metadata.get("prepared", ()) if "dpi" in one]
    return max(drawn, default=pdf.DPI)


def public(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a description of prepared data without paths and listings, which may name what is
    nobody else's business."""
    # Lists and groups are of files: what they are called may say what is in them.
    plain = {name: x for name, x in description.items() if isinstance(x, str | int | float)}
    return {
        name: x.rstrip("/").rpartition("/")[2] if isinstance(x, str) and PRIVATE.search(x) else x
        for name, x in plain.items()
    }


def is_exported(path: Path) -> bool:
    """Whether a folder is one that `convert --export` wrote."""
    return (path / FILE).is_file()


def read(path: Path, read: Callable[[Any, int], T]) -> T:
    """Returns what `restore.read_newest` does, also for an exported model, whose step is that of
    the checkpoint that was exported."""
    if not is_exported(path):
        return restore.read_newest(path, read)
    model = Exported(path)
    # Each host reads its own copy.
    distributed.check_alike({f"exported model {path.name}": model.text})
    return read(model, model.step)


class Exported:
    """An exported model, read as `train.checkpoint_reading.Reader` reads a checkpoint.

    Raises:
      UserError: it is of a version that is not read, not all components are there, or alignvlm.json
        is damaged.
    """

    def __init__(self, folder: Path):
        if storage.is_bucket(folder):
            raise UserError(
                f"{folder} is not on this machine, and exported models are read from a disk: copy "
                "it first (gcloud storage cp --recursive)"
            )
        # Before anything large is read, so that a folder is refused at once.
        storage.check_whole(folder)
        self.folder = folder
        path = folder / FILE
        if not path.exists():
            raise UserError(
                f"{folder} holds no {FILE}: it is no model that `convert --export` wrote"
            )
        fields = read_json(path)
        if fields.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {fields.get('format_version')!r}; this version reads "
                f"{FORMAT_VERSION}"
            )
        try:
            self.text = json.dumps(fields, sort_keys=True)
            self._metadata = dict(fields["metadata"])
            # One stage: what came before it is told by `num_sequences`.
            [self._config] = config_lib.from_json(self._metadata["config"])
            self.step = int(self._metadata["step"])
            self._layout = fields["layout"]
            held = list(fields["components"])
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise UserError(f"{path} is damaged: {type(err).__name__} {err}") from err
        except UserError as err:
            raise UserError(f"{path}: {err}") from err
        if self._layout not in export.LAYOUTS:
            raise UserError(f"{path} is damaged: layout is {self._layout!r}")
        # Without its factors the language model is not the one that the connector was trained with.
        if fields.get("has_adapter"):
            raise UserError(
                f"{folder} holds the language model as before LoRA, and its factors beside it for "
                "peft (--adapter): export without --adapter to use it here"
            )
        missing = [name for name in export.COMPONENTS if name not in held]
        if missing:
            raise UserError(
                f"{folder} was exported without {', '.join(missing)}: export all components "
                "(without --components) to use it again"
            )

    def config(self, step: int) -> Config:
        """Returns the config of the stage that was exported."""
        return self._config

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what is known of the checkpoint, of `train.checkpoint.describe`."""
        return self._metadata

    def tokenizer(self, step: int) -> dict[str, bytes]:
        """Returns the files of the tokenizer by name.

        Raises:
          UserError: there is none.
        """
        folder = self.folder if self._layout == "transformers" else self.folder / "llm"
        files = {name: folder / name for name in tokenizers.KEPT}
        found = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
        # Without its format a chat would be guessed from special tokens, as of a foreign folder.
        needed = tokenizers.CHAT_FORMAT
        if not found.keys() & set(tokenizers.NAMES) or needed not in found:
            raise UserError(
                f"{folder} holds no {' or '.join(tokenizers.NAMES)} with a {needed} beside it"
            )
        return found

    def stored_params(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of every stored parameter by path; UserError where a tensor
        is missing, or of another shape than alignvlm.json says."""
        return {
            entry.path: jax.ShapeDtypeStruct(
                self._wanted[entry.path].shape,
                load.dtype_of(tower.source, entry, self._wanted[entry.path].shape),
            )
            for tower in self._towers
            for entry in tower.entries
        }

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Returns the parameters that `abstract` names, in its dtypes and on its shardings."""
        wanted = state.flatten(abstract)
        found: dict[str, Array] = {}
        for tower in self._towers:
            # An export reads one parameter at a time.
            entries = tuple(one for one in tower.entries if one.path in wanted)
            found |= load.load_tower(Tower(tower.source, tower.config, entries), wanted)
        return state.unflatten({path: x.astype(wanted[path].dtype) for path, x in found.items()})

    @functools.cached_property
    def _wanted(self) -> dict[str, jax.ShapeDtypeStruct]:
        # Of one device: names and shapes alone are read here, shardings come with `abstract`.
        model = vlm.VLM(self._config.model)
        return state.flatten(state.abstract_params(model, mesh_lib.single_device()))

    @functools.cached_property
    def _towers(self) -> list[Tower]:
        """What is read from each folder, checked."""
        model = self._config.model
        shapes = {path: x.shape for path, x in self._wanted.items()}
        parts = {
            name: export.component_of(name, self._layout, model, shapes)
            for name in export.COMPONENTS
        }
        ignored = families.llm_of(model.llm).ignored(model.llm)
        if self._layout == "transformers":
            entries = tuple(entry for part in parts.values() for entry in part.entries)
            # One folder for all: names begin with their component.
            ignored = tuple(f"llm\\.{pattern}" for pattern in ignored)
            towers = [Tower(SafetensorsFolder(self.folder), model.llm, entries, ignored)]
        else:
            towers = [
                Tower(SafetensorsFolder(self.folder / name), model.llm, part.entries, ignored)
                for name, part in parts.items()
            ]
        # Before the first tensor is read: all names and shapes, of all components.
        for tower in towers:
            load.check_tower(tower, self._wanted)
        return towers
