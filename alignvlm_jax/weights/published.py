"""A checkpoint written as published formats: towers as Hugging Face folders, or one model for
transformers."""

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np

from alignvlm_jax import __version__, storage
from alignvlm_jax import config as config_lib
from alignvlm_jax.config import Config, DataConfig
from alignvlm_jax.data import chat_format, chat_template, images, stage_data, tokenizers
from alignvlm_jax.data.tokenizers.base import ChatFiles, Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import lora, restore, state
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.checkpoint_reading import LAYOUT_VERSION
from alignvlm_jax.weights import adapter, export, exported, initial
from alignvlm_jax.weights.exported import SpecialIds

PYTORCH = importlib.resources.files("alignvlm_jax.weights") / "pytorch"
CODE = (
    *("modeling_alignvlm.py", "components_alignvlm.py"),
    *("processing_alignvlm.py", "pages_alignvlm.py"),
)
CARD = "README.md"
SCORES = "summary.json"
MODELING = "modeling_alignvlm.AlignVLM"


def write_export(
    path: Path,
    out: Path,
    components: tuple[str, ...],
    layout: str,
    *,
    with_adapter: bool = False,
) -> dict[str, int]:
    """Writes components of a checkpoint into the folder `out`, which appears whole or not at all.
    Factors of LoRA are merged into their kernels.

    Args:
      path: a workdir, whose newest readable checkpoint is taken, one checkpoint folder
        `checkpoints/STEP`, or an exported model.
      out: must not exist.
      components: names in `export.COMPONENTS`.
      layout: of `export.LAYOUTS`.
      with_adapter: the factors of the LLM are not merged, but written beside it.

    Returns:
      The number of tensors written, by component.

    Raises:
      UserError: `out` exists, there is no readable checkpoint, its tokenizer is missing, or a
        component cannot be expressed.
    """
    storage.refuse_existing(out)

    def write(checkpoints: Checkpoints, step: int) -> dict[str, int]:
        return _Export(path, checkpoints, step, layout, with_adapter).write(out, components)

    return exported.read(path, write)


class _Export:
    """One checkpoint on its way out."""

    def __init__(
        self, path: Path, checkpoints: Checkpoints, step: int, layout: str, with_adapter: bool
    ):
        config = checkpoints.config(step)
        found = checkpoints.stored_params(step)
        # One device will do, since parameters are read one at a time.
        mesh = mesh_lib.single_device()
        self._checkpoints = checkpoints
        self._step = step
        self._layout = layout
        whole = sharding.replicated(mesh)
        # As it is stored; what is written has the tables without the rows of padding, which other
        # programs would take for tokens.
        self._found = {path: x.update(sharding=whole) for path, x in found.items()}
        self._with_adapter = with_adapter
        # With the adapter beside it the LLM stays as it was.
        merging = [path for path in found if not (with_adapter and path.startswith("lora/llm/"))]
        self._read_merged = lora.reader(self._raw, merging, config.lora.alpha, config.model)
        model = export.without_padding(config.model)
        wanted = state.flatten(state.abstract_params(vlm.VLM(model), mesh))
        # In the dtypes that are stored: what is not rounded on its way in must not be on its way
        # out. Nor must a product of factors be.
        with_factors = lora.kernels(merging)
        self._stored = {
            path: wanted[path].update(
                dtype=lora.merged_dtype(x.dtype, config.model) if path in with_factors else x.dtype
            )
            for path, x in found.items()
            if not lora.is_factor(path)
        }
        self._config = dataclasses.replace(config, model=model)
        self._scores = _scores(path, step)
        self._files = checkpoints.tokenizer(step) or _tokenizer_files(path, config.data)
        self._tokenizer = tokenizers.of_files(self._files, f"of {path}")
        self._ids = exported.special_ids(self._tokenizer, self._files)

    def write(self, out: Path, components: tuple[str, ...]) -> dict[str, int]:
        """See `write_export`."""
        config = self._config
        export.check(config.model, components)
        if self._layout == "transformers" and config.data.tiling != "grid":
            raise UserError(
                f"config.data.tiling {config.data.tiling!r} is not exported: the processor for "
                "transformers cuts pages into a grid alone; --format=components can be exported"
            )
        if self._layout == "transformers" and config.data.blank_contrast:
            raise UserError(
                f"config.data.blank_contrast {config.data.blank_contrast} is not exported: the "
                "processor for transformers gives every patch an image token; "
                "--format=components can be exported"
            )
        if self._with_adapter:
            adapter.check(config.model, self._found, components)
        metadata = self._checkpoints.metadata(self._step)
        seen = initial.num_sequences(metadata, self._step, self._stored)
        metadata = metadata | {"step": self._step, "num_sequences": seen}
        parts = self._components(components)
        # All that may be refused comes before the folder is made.
        description = self._describe(metadata, parts)
        with storage.whole_folder(out) as target, storage.local_folder(target) as folder:
            if self._layout == "components":
                counts = export.write(parts, self._stored, self._read, folder)
                texts = folder / "llm" if "llm" in components else None
                if self._with_adapter:
                    place = folder / adapter.FOLDER
                    alpha = config.lora.alpha
                    counts[adapter.FOLDER] = adapter.write(
                        config.model, alpha, self._found, self._raw, place
                    )
            else:
                counts = export.write_whole(parts, self._read, folder)
                self._write_transformers(folder, parts, description)
                texts = folder
            if texts:
                write_texts(
                    texts,
                    self._tokenizer,
                    self._files,
                    self._ids,
                    config.eval.max_new_tokens,
                )
            export.write_json(folder / exported.FILE, description)
        return counts

    def _describe(
        self, metadata: Mapping[str, Any], parts: Mapping[str, export.Component]
    ) -> dict[str, Any]:
        """All that is needed to use the model again, and where it is from."""
        config = self._config
        model = config.model
        kept = ("run_id", "step", "stage", "train_seconds", "git", "libraries", "num_sequences")
        return {
            "format_version": exported.FORMAT_VERSION,
            "alignvlm_jax": __version__,
            "layout": self._layout,
            "has_adapter": self._with_adapter,
            "components": {name: part.names for name, part in parts.items()},
            "input": self._input(metadata),
            # The connector's is of LN_1 and LN_2 of ALIGN, and of the LN of Ovis.
            "norm_eps": {
                "vision": model.vision.norm_eps,
                "llm": model.llm.norm_eps,
                "connector": model.llm.norm_eps,
            },
            "metadata": {name: metadata.get(name) for name in kept}
            | {
                "layout_version": LAYOUT_VERSION,
                "prepared": [exported.public(one) for one in metadata.get("prepared", ())],
                "config": config_lib.to_json((self._public_config(),)),
            },
        }

    def _public_config(self) -> Config:
        """The config without folders, and without the mesh, which is of those machines."""
        config = self._config
        data = config_lib.DataConfig(
            dir="data",
            seq_len=config.data.seq_len,
            max_tiles=config.data.max_tiles,
            record_tiles=config.data.record_tiles,
            use_overview=config.data.use_overview,
            tiling=config.data.tiling,
            blank_contrast=config.data.blank_contrast,
            text_unit=config.data.text_unit,
            images_first=config.data.images_first,
        )
        # Merged, or in an adapter that this program does not read back.
        return dataclasses.replace(
            config, init_from="", data=data, mesh=config_lib.MeshConfig(), lora=lora.OFF
        )

    def _input(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """How a page and a question become what the model reads, in plain values."""
        config = self._config
        vision = config.model.vision
        return {
            "tile_height": vision.tile_height,
            "tile_width": vision.tile_width,
            "max_tiles": config.data.tiles_of_a_record,
            "use_overview": config.data.use_overview,
            "tiling": config.data.tiling,
            "blank_contrast": config.data.blank_contrast,
            "text_unit": config.data.text_unit,
            # The grid of the fewest cells that keeps this fraction of a page's pixels, else the
            # best; each cell is resized to fit its tile, and lies at its top left.
            "min_coverage": images.MIN_COVERAGE,
            "resample": "bicubic",
            "background": 255,
            "pixel_mean": list(vision.pixel_mean),
            "pixel_std": list(vision.pixel_std),
            "pdf_dpi": exported.pdf_dpi(metadata),
            "image_token_id": config.model.image_token_id,
            "tokens_per_tile": config.model.tokens_per_tile,
            "chat_format": json.loads(
                chat_format.to_json(chat_template.format_of(self._tokenizer))
            ),
            "stop_token_ids": list(self._ids.eos),
            "pad_token_id": self._ids.pad,
            "seq_len": config.data.seq_len,
            "max_new_tokens": config.eval.max_new_tokens,
        }

    def _components(self, names: tuple[str, ...]) -> dict[str, export.Component]:
        model = self._config.model
        shapes = {path: x.shape for path, x in self._stored.items()}
        found = {name: export.component_of(name, self._layout, model, shapes) for name in names}
        if "llm" in found:
            # A family writes no length of its own where none is known.
            length = model.llm.context_length or self._config.data.seq_len
            own = {"max_position_embeddings": length, **self._ids.fields()}
            found["llm"] = found["llm"]._replace(fields=found["llm"].fields | own)
        return found

    def _raw(self, path: str) -> np.ndarray:
        """A parameter as it is stored."""
        wanted = state.unflatten({path: self._found[path]})
        [array] = jax.tree.leaves(self._checkpoints.restore_params(self._step, wanted))
        return np.asarray(array)

    def _read(self, path: str) -> np.ndarray:
        """A parameter as it is written."""
        # Along an axis over the vocabulary the padding stands last.
        return self._read_merged(path)[tuple(map(slice, self._stored[path].shape))]

    def _write_transformers(
        self, folder: Path, parts: Mapping[str, export.Component], description: Mapping[str, Any]
    ) -> None:
        """Writes what transformers wants beside the tensors."""
        model = self._config.model
        # The code travels with the weights: transformers runs what the folder holds.
        for name in CODE:
            (folder / name).write_bytes((PYTORCH / name).read_bytes())
        # The modules of `pytorch` are made of these.
        own = {
            entry.name: list(self._stored[entry.path].shape)
            for name in ("vision", "connector")
            for entry in parts[name].entries
        }
        connector = dataclasses.asdict(model.connector)
        config = {
            "architectures": ["AlignVLMForCausalLM"],
            "model_type": "alignvlm",
            "auto_map": {
                "AutoConfig": f"{MODELING}Config",
                "AutoModelForCausalLM": f"{MODELING}ForCausalLM",
                "AutoModelForImageTextToText": f"{MODELING}ForCausalLM",
            },
            "dtype": export.dtype_of(parts.values(), self._stored),
            "text_config": parts["llm"].fields,
            "vision_config": dataclasses.asdict(model.vision),
            "connector_config": connector | {"norm_eps": model.llm.norm_eps},
            "image_token_id": model.image_token_id,
            "tie_word_embeddings": model.llm.tie_embeddings,
            "shapes": own,
            **self._ids.fields(),
        }
        export.write_json(folder / "config.json", config)
        processor = {"AutoProcessor": "processing_alignvlm.AlignVLMProcessor"}
        export.write_json(
            folder / "processor_config.json", {"auto_map": processor, **description["input"]}
        )
        template = jinja2.Template((PYTORCH / f"{CARD}.jinja").read_text(), trim_blocks=True)
        # What the folder holds: without padding, a tied head once.
        count = sum(int(np.prod(x.shape)) for x in self._stored.values())
        card = template.render(
            config=self._config, description=description, scores=self._scores, num_params=count
        )
        (folder / CARD).write_text(card + "\n")


def write_texts(
    folder: Path,
    tokenizer: Tokenizer,
    files: Mapping[str, bytes],
    ids: SpecialIds,
    max_new_tokens: int,
) -> None:
    """Writes what a language model needs beside its tensors: the tokenizer's own files, its chat
    template, and where generation stops."""
    # By name, never by copying a folder: the tokenizer's may hold the training data as well.
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / tokenizers.TEMPLATE).write_text(_template(tokenizer, files))
    # Greedy, as the model was evaluated, whatever the published weights were sampled with.
    generation = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        **ids.fields(),
    }
    export.write_json(folder / "generation_config.json", generation)
    # Without it AutoTokenizer knows neither beginning nor end.
    if tokenizers.NAMES[0] in files and tokenizers.SETTINGS not in files:
        names = {i: name for name, i in tokenizer.special_tokens.items()}
        named = {"bos_token": ids.bos, "eos_token": ids.eos[0], "pad_token": ids.pad}
        settings = {name: names[i] for name, i in named.items() if i is not None}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        export.write_json(folder / tokenizers.SETTINGS, settings)


def _template(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> str:
    """The source's own template where the model speaks by it, else one that writes its format."""
    found = chat_template.format_of(tokenizer)
    named = tuple(tokenizers.named_tokens(files).items())
    if own := tokenizers.template(files):
        read = ChatFiles(tokenizers.TEMPLATE, template=own, named_tokens=named)
        try:
            if chat_template.read(read, tokenizer.special_tokens) == found:
                return own
        except UserError:
            # One that cannot be read stands beside a format that was written by hand.
            pass
    return chat_format.to_template(found)


def _tokenizer_files(path: Path, data: DataConfig) -> dict[str, bytes]:
    """Of a checkpoint that has none with it: what `convert` wrote has it beside, wherever it was
    moved."""
    beside = tokenizers.of_converted(restore.workdir_of(path))
    found = beside or stage_data.tokenizer_path(data)
    return stage_data.tokenizer_files(tokenizers.load(found))


def _scores(path: Path, step: int) -> dict[str, Any]:
    """What `evaluate` wrote of this very checkpoint beside it; nothing where it did not."""
    workdir = restore.workdir_of(path)
    try:
        found = json.loads((workdir / SCORES).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("step") == step else {}
