"""Folders of models as people have them: small random ones with the spellings, files and damages
that are met. What is refused says by which message; all else is read, and equals transformers
(tests/parity/test_variations.py)."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.weights import folders

Tensors = dict[str, np.ndarray]
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
HEAD = "lm_head.weight"
TABLE = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Case:
    """How a folder is written below a path, by which message it is refused, if it is, and with
    which tiles an encoder is read."""

    write: Callable[[Path], Path]
    refused: str = ""
    tile_size: int | None = None


def change_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Changes the fields of a file; Ellipsis takes one out."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: x for name, x in fields.items() if x is not ...}))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / "model.safetensors"
    )


def llm(
    variant: str = "untied",
    refused: str = "",
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] | None = None,
    files: Callable[[Path], Path | None] | None = None,
    **sizes: Any,
) -> Case:
    """A case of a language model.

    Args:
      config: changes of config.json, after the tensors were written.
      tensors: changes them.
      files: changes the folder at last, and may return another path.
      sizes: of `folders.write_llama`.
    """

    def write(root: Path) -> Path:
        folder = folders.write_llama(root / "llm", variant, seed=7, **sizes)
        change_json(folder / "config.json", config or {})
        if tensors:
            change_tensors(folder, tensors)
        return (files and files(folder)) or folder

    return Case(write, refused)


def encoder(
    kind: str = "siglip",
    refused: str = "",
    *,
    tile: int | None = None,
    sizes: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    nested: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] | None = None,
    pre: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
) -> Case:
    """A case of an encoder: `nested` changes its vision_config, `pre` and `processor` are the files
    of its image processor."""
    options = {"whole": {"is_whole": True}, "naflex": {"is_naflex": True}}.get(kind, {})

    def write(root: Path) -> Path:
        folder = root / "vision"
        if kind == "dinov2":
            folders.write_dinov2(folder, seed=8)
        else:
            folders.write_siglip(folder, seed=8, sizes=sizes, **options)
        path = folder / "config.json"
        if nested is not None:
            inner = json.loads(path.read_text())["vision_config"] | nested
            inner = {name: x for name, x in inner.items() if x is not ...}
            change_json(path, {"vision_config": inner})
        change_json(path, config or {})
        if tensors:
            change_tensors(folder, tensors)
        for name, fields in (("preprocessor_config", pre), ("processor_config", processor)):
            if fields is not None:
                (folder / f"{name}.json").write_text(json.dumps(fields))
        return folder

    return Case(write, refused, tile)


def _cast(dtype: Any) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()}


def _renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): x for name, x in tensors.items()}


def _without(*endings: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: x for name, x in tensors.items() if not name.endswith(endings)}


def _index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """Changes the index of a folder of shards."""

    def files(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return files


def _stale(folder: Path) -> None:
    """A shard holds an old table, too."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    [other] = set(weight_map.values()) - {weight_map[TABLE]}
    tensors = load_file(folder / other)
    save_file(tensors | {TABLE: load_file(folder / weight_map[TABLE])[TABLE] + 1}, folder / other)


def _with_inv_freq(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(path) | {INV_FREQ: np.ones(4, np.float32)}, path)


def _hub(folder: Path) -> Path:
    """The cache of a hub: snapshots of links to blobs."""
    root = folder.parent / "models--x--y"
    for name in ("blobs", "snapshots/abc"):
        (root / name).mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(root / "blobs" / str(number))
        (root / "snapshots/abc" / file.name).symlink_to(f"../../blobs/{number}")
    return root / "snapshots/abc"


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    change_json(folder / "adapter_config.json", {"base_model_name_or_path": "someone/base"})


def _file(name: str, *, instead: str = "config.json") -> Callable[[Path], None]:
    return lambda folder: (folder / instead).rename(folder / name) and None


def _quantised(**group: Any) -> dict[str, Any]:
    return {"quantization_config": group}


LLAMA3 = folders.LLAMA3_SCALING
YARN = folders.YARN
LINEAR = {"rope_type": "linear", "factor": 2.0}
BARE = _renamed(lambda name: name.removeprefix("model."))
WITHOUT_LENGTH = {k: x for k, x in LLAMA3.items() if not k.startswith("original")}


def _v5(**group: Any) -> dict[str, Any]:
    return {"rope_parameters": group, "rope_theta": ...}


def _v4(**group: Any) -> dict[str, Any]:
    return {"rope_scaling": group, "rope_theta": 500.0}


LLMS: dict[str, Case] = {
    **{f"plain {variant}": llm(variant) for variant in folders.DECODERS},
    # Rotary positions.
    "theta absent": llm(config={"rope_theta": ...}),
    "groups null": llm(config={"rope_parameters": None, "rope_scaling": None}),
    "theta a whole number": llm(config={"rope_theta": 700}),
    "theta beside a group": llm(config={"rope_parameters": LLAMA3, "rope_theta": 700.0}),
    "theta in a group too": llm(
        config={"rope_parameters": {**LINEAR, "rope_theta": 300.0}, "rope_theta": 9.0}
    ),
    "theta a text": llm(config={"rope_theta": "500"}, refused=r"rope_theta is '500'.* a number"),
    "llama3 by type": llm(
        config=_v4(type="llama3", **{k: x for k, x in LLAMA3.items() if k != "rope_type"})
    ),
    "llama3 whose length is at the top": llm(
        config=_v4(**WITHOUT_LENGTH) | {"original_max_position_embeddings": 24}
    ),
    "llama3 whose length is the model's": llm(config=_v4(**WITHOUT_LENGTH)),
    "llama3 lacks a field": llm(
        config=_v4(rope_type="llama3", factor=8.0), refused=r"does not say low_freq_factor"
    ),
    "llama3 factor a text": llm(config=_v4(**LLAMA3 | {"factor": "8"}), refused=r"factor is '8'"),
    "both groups": llm(config={**_v5(**LINEAR, rope_theta=500.0), "rope_scaling": LLAMA3}),
    "an empty group and another": llm(
        config={"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 300.0}}
    ),
    "a group of type default": llm(config=_v4(type="default")),
    "linear, v4": llm(config=_v4(type="linear", factor=2.0)),
    "linear, v5": llm(config=_v5(**LINEAR, rope_theta=500.0)),
    "linear, qwen2": llm("qwen2, untied", config=_v4(**LINEAR)),
    "yarn, v4": llm(config=_v4(**YARN)),
    "yarn by type, qwen2": llm(
        "qwen2, untied", config=_v4(type="yarn", **{k: YARN[k] for k in list(YARN)[1:]})
    ),
    "yarn, qwen3": llm("qwen3, untied", config=_v4(**YARN)),
    "yarn, mistral": llm("mistral", config=_v4(**YARN)),
    "yarn, v5": llm(config=_v5(**YARN, rope_theta=700.0)),
    "yarn with bounds": llm(config=_v4(**YARN, beta_fast=4.0, beta_slow=0.5)),
    "yarn with a long length": llm(config=_v4(**YARN | {"original_max_position_embeddings": 60})),
    "yarn with its factor": llm(config=_v4(**YARN, attention_factor=0.7)),
    "yarn with mscales": llm(config=_v4(**YARN, mscale=0.7, mscale_all_dim=1.3)),
    "yarn with one mscale": llm(config=_v4(**YARN, mscale=0.7)),
    "yarn without a length": llm(config=_v4(rope_type="yarn", factor=4.0)),
    "yarn between pairs": llm(config=_v4(**YARN, truncate=False), refused=r"truncate is False"),
    "dynamic, v4": llm(
        config=_v4(type="dynamic", factor=2.0), refused=r"type of rope_scaling is 'dynamic'.*length"
    ),
    "dynamic, v5": llm(
        config=_v5(rope_type="dynamic", factor=2.0), refused=r"of rope_parameters is 'dynamic'"
    ),
    "longrope": llm(
        config=_v4(type="longrope"), refused=r"is 'longrope'; read are: 'default', 'll"
    ),
    "proportional": llm(config=_v5(rope_type="proportional"), refused=r"is 'proportional'"),
    "no group": llm(config={"rope_scaling": "yarn"}, refused=r"rope_scaling is 'yarn'"),
    "partial": llm(config={"partial_rotary_factor": 0.5}, refused=r"partial_rotary_factor is 0\.5"),
    "partial, v5": llm(
        config=_v5(rope_type="default", partial_rotary_factor=0.5),
        refused=r"partial_rotary_factor is 0\.5",
    ),
    "a group by kind of layer": llm(
        "qwen3, untied",
        config=_v5(full_attention={"rope_type": "default", "rope_theta": 300.0})
        | {"layer_types": ["full_attention"] * 7},
        refused=r"it must be one group for all layers",
    ),
    # Sizes and options.
    "head_dim null": llm(head_dim=4, config={"head_dim": None}),
    "head_dim absent": llm(head_dim=4, config={"head_dim": ...}),
    "head_dim absent, qwen3": llm(
        "qwen3, untied", config={"head_dim": ...}, refused=r"does not say head_dim"
    ),
    "kv heads null": llm(num_key_value_heads=6, config={"num_key_value_heads": None}),
    "kv heads absent": llm(num_key_value_heads=6, config={"num_key_value_heads": ...}),
    "kv heads absent, mistral": llm(
        "mistral", config={"num_key_value_heads": ...}, refused=r"does not say num_key_value_heads"
    ),
    "eps absent": llm(config={"rms_norm_eps": ...}),
    "eps a text": llm(config={"rms_norm_eps": "1e-05"}, refused=r"rms_norm_eps is '1e-05'"),
    "a size a text": llm(config={"vocab_size": "96"}, refused=r"vocab_size is '96'.* whole number"),
    "swish": llm(config={"hidden_act": "swish"}),
    "gelu": llm(config={"hidden_act": "gelu"}, refused=r"hidden_act is 'gelu'; read are: 'silu'"),
    "attention_bias": llm(config={"attention_bias": True}, refused=r"attention_bias is True"),
    "mlp_bias": llm(config={"mlp_bias": True}, refused=r"mlp_bias is True"),
    "biases of no field": llm(
        "qwen2, untied", config={"model_type": "llama"}, refused=r"21 tensor"
    ),
    "qwen2 without biases": llm(
        "qwen2, untied", tensors=_without(".bias"), refused=r"lacks 21 tensors: .*q_proj\.bias"
    ),
    "fewer layers than the files": llm(
        config={"num_hidden_layers": 6}, refused=r"holds what no parameter of ours is: 9 tensors"
    ),
    "more layers than the files": llm(config={"num_hidden_layers": 8}, refused=r"lacks 9 tensors"),
    "another vocabulary": llm(config={"vocab_size": 100}, refused=r"must be \(100, 24\)"),
    # The head.
    "tie absent": llm(config={"tie_word_embeddings": ...}),
    "tie absent without a head": llm(
        "tied", config={"tie_word_embeddings": ...}, refused=r"lacks 1 tensor: lm_head\.weight"
    ),
    "tie a text": llm(
        config={"tie_word_embeddings": "false"}, refused=r"tie_word_embeddings is 'false'.* true or"
    ),
    "tied, the head written": llm("tied", tensors=lambda t: {**t, HEAD: t[TABLE]}),
    "tied, another head": llm(config={"tie_word_embeddings": True}),
    "tied, another head, qwen3": llm("qwen3, untied", config={"tie_word_embeddings": True}),
    "tied, another head in bfloat16": llm(
        config={"tie_word_embeddings": True}, tensors=_cast(ml_dtypes.bfloat16)
    ),
    "tied, only the head": llm(
        "tied",
        tensors=_renamed(lambda n: HEAD if n == TABLE else n),
        refused=r"lacks 1 .*embed_tok",
    ),
    # Files.
    "bfloat16": llm(dtype=ml_dtypes.bfloat16),
    "float16": llm(dtype=np.float16),
    "float64": llm(dtype=np.float64),
    "mixed types": llm(
        tensors=lambda t: {
            n: x if "norm" in n else x.astype(ml_dtypes.bfloat16) for n, x in t.items()
        }
    ),
    "shards": llm(num_shards=3),
    "one shard without an index": llm(
        files=_file("model-00001-of-00001.safetensors", instead="model.safetensors"),
        refused=r"it holds model-00001-of-00001\.safetensors",
    ),
    "inv_freq": llm(files=_with_inv_freq),
    "inv_freq that the index lacks": llm(num_shards=3, files=_with_inv_freq),
    "the index lacks the table": llm(num_shards=2, files=_index(lambda m: m.pop(TABLE))),
    "a stale tensor in another shard": llm(num_shards=2, files=_stale),
    "not a number": llm(
        tensors=lambda t: {**t, "model.norm.weight": t["model.norm.weight"] * np.nan},
        refused=r"model\.norm\.weight holds numbers that are not finite",
    ),
    "a snapshot of links": llm(files=_hub),
    "a cache": llm(files=lambda f: _hub(f).parents[1], refused=r"cache of the .*snapshots/abc$"),
    "a cache of models": llm(files=lambda f: _hub(f).parents[2], refused=r"cache of 1 models"),
    "an adapter": llm(files=_adapter, refused=r"is a LoRA adapter of someone/base: merge it"),
    "a publisher's own": llm(files=_file("params.json"), refused=r"own format \(params\.json\)"),
    "a folder of GGUF": llm(files=_file("q.gguf"), refused=r"holds GGUF files: name one .*q\.gguf"),
    "bnb": llm(
        config=_quantised(quant_method="bitsandbytes", load_in_4bit=True),
        refused=r"is quantised \(bitsandbytes, 4 bits\)",
    ),
    "gptq": llm(config=_quantised(quant_method="gptq", bits=4), refused=r"\(gptq, 4 bits\)"),
    "awq": llm(config=_quantised(quant_method="awq", bits=4), refused=r"\(awq, 4 bits\)"),
    "fp8": llm(config=_quantised(quant_method="fp8"), refused=r"is quantised \(fp8\)"),
    "mlx": llm(config={"quantization": {"bits": 8}}, refused=r"is quantised \(mlx, 8 bits\)"),
    "gguf's blocks": llm(
        config=_quantised(quant_method="gguf", dequantize=False),
        tensors=lambda t: {**t, TABLE: np.ones((300, 34), np.uint8)},
        refused=r"is quantised \(gguf\), which is read from a GGUF file alone",
    ),
    # Classes.
    "no head": llm(
        config={"architectures": ["LlamaModel"]},
        tensors=lambda t: _without(HEAD)(BARE(t)),
        refused=r"embed_tokens\.weight in the place of model\.embed_tokens.*the class LlamaModel",
    ),
    "a classifier": llm(
        config={"architectures": ["LlamaForSequenceClassification"]},
        tensors=lambda t: {**_without(HEAD)(t), "score.weight": t[HEAD][:3]},
        refused=r"lacks 1 tensor: lm_head\.weight \(config\.json names the class LlamaForSequence",
    ),
    "a tied classifier": llm(
        "tied",
        config={"architectures": ["LlamaForSequenceClassification"]},
        tensors=lambda t: {**t, "score.weight": t[TABLE][:3]},
        refused=r"no parameter of ours is: 1 tensor: score\.weight \(config\.json names",
    ),
    "within another model": llm(
        tensors=_renamed(lambda n: f"language_model.{n}"),
        refused=r"it holds language_model\.model\.embed_tokens\.weight in the place of model\.embed",
    ),
    "architectures absent": llm(config={"architectures": ...}),
    "no type": llm(config={"model_type": ...}, refused=r"model_type is None; read are: 'llama'"),
    "gemma": llm(
        config={"model_type": "gemma3_text"}, refused=r"'gemma3_text' is not read: its nor"
    ),
    "a whole model": llm(
        config={"model_type": "qwen2_vl"}, refused=r"a language model with an enc"
    ),
    "granite": llm(config={"model_type": "granite"}, refused=r"model_type is 'granite'; read are"),
    # Windows.
    "window absent, mistral": llm("mistral", config={"sliding_window": ...}),
    "window absent of a long mistral": llm(
        "mistral",
        config={"sliding_window": ..., "max_position_embeddings": 8192},
        refused=r"a sliding_window of 4096 tokens of the 8192 of max_position",
    ),
    "window, mistral": llm(
        "mistral", config={"sliding_window": 16}, refused=r"sliding_window of 16 tokens of the 64"
    ),
    "window of no size, qwen2": llm(
        "qwen2, untied", config={"use_sliding_window": True, "sliding_window": None}
    ),
    "window of all, qwen2": llm(
        "qwen2, untied", config={"use_sliding_window": True, "sliding_window": 64}
    ),
    "window, qwen3": llm(
        "qwen3, untied",
        config={"use_sliding_window": True, "sliding_window": 16},
        refused=r"sliding_window of 16 tokens",
    ),
    "window of a layer": llm(
        "qwen2, tied",
        config={"layer_types": ["full_attention"] * 6 + ["sliding_attention"]},
        refused=r"layer_types names 'sliding_attention'",
    ),
    # Layers without rotary positions.
    "smollm3 by interval": llm("smollm3", config={"no_rope_layers": ...}),
    "smollm3 by default": llm(
        "smollm3", config={"no_rope_layers": None, "no_rope_layer_interval": ...}
    ),
    "smollm3, a list against its interval": llm("smollm3", config={"no_rope_layer_interval": 2}),
    "smollm3, every second": llm("smollm3", config={"no_rope_layers": [1, 0] * 3 + [1]}),
    "smollm3, all rotate": llm("smollm3", config={"no_rope_layers": [1] * 7}),
    "smollm3, none rotates": llm("smollm3", config={"no_rope_layers": [0] * 7}),
    "smollm3, a longer list": llm("smollm3", config={"no_rope_layers": [1, 1, 1, 0] * 3}),
    "smollm3, no interval": llm(
        "smollm3",
        config={"no_rope_layers": [1, 0, 0, 1, 1, 1, 1]},
        refused=r"no rotary positions in \[1, 2\]; read is one layer in every so many",
    ),
    "smollm3, a short list": llm(
        "smollm3", config={"no_rope_layers": [1, 1]}, refused=r"names 2 of 7 layers"
    ),
    "smollm3 by its class": llm(
        "smollm3", config={"rope_theta": ..., "tie_word_embeddings": ..., "no_rope_layers": ...}
    ),
}


def _default(kind: str = "whole", **field: int) -> Case:
    """A field that is its class's default and left out, as transformers before 4.51 wrote it."""
    return encoder(kind, sizes=field, nested=dict.fromkeys(field, ...))


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
VISION: dict[str, Case] = {
    **{f"plain {kind}": encoder(kind) for kind in ("siglip", "whole", "naflex", "dinov2")},
    **{
        f"{kind} of {tile} pixels": encoder(kind, tile=tile)
        for kind in ("siglip", "whole", "naflex", "dinov2")
        for tile in (18, 30, 36)
    },
    # Fields that are left out, or stale.
    "width by default": _default(hidden_size=768),
    "mlp by default": _default(intermediate_size=3072),
    "layers by default": _default(num_hidden_layers=12),
    "heads by default": encoder(
        "whole",
        sizes={"num_attention_heads": 12, "hidden_size": 24},
        nested={"num_attention_heads": ...},
    ),
    "patch by default": encoder(
        "whole", sizes={"patch_size": 16, "image_size": 48}, nested={"patch_size": ...}
    ),
    "image by default": encoder(
        "whole", sizes={"image_size": 224, "patch_size": 56}, nested={"image_size": ...}
    ),
    "eps and activation by default": encoder(
        "whole", nested={"layer_norm_eps": ..., "hidden_act": ...}
    ),
    "patches by default": encoder(
        "naflex", sizes={"num_patches": 256}, config={"num_patches": ..., "image_size": 24}
    ),
    "patch by default, alone": encoder(
        sizes={"patch_size": 16, "image_size": 48}, config={"patch_size": ...}
    ),
    "a stale num_patches": encoder(config={"num_patches": 9}),
    "a stale num_patches within": encoder("whole", nested={"num_patches": 9}),
    "stale sizes outside": encoder("whole", config={"hidden_size": 99, "patch_size": 3}),
    "sizes of the text tower": encoder("whole", config={"text_config": {"hidden_size": 7}}),
    "remaining pixels": encoder(sizes={"image_size": 26}),
    "num_patches no square": encoder("naflex", config={"num_patches": 15}, refused=r"no square"),
    # Options.
    "gelu": encoder(config={"hidden_act": "gelu"}),
    "gelu_new": encoder(config={"hidden_act": "gelu_new"}),
    "quick_gelu": encoder(
        config={"hidden_act": "quick_gelu"}, refused=r"is 'quick_gelu'; read are"
    ),
    "eps": encoder(config={"layer_norm_eps": 0.1}),
    "eps a text": encoder(config={"layer_norm_eps": "1e-06"}, refused=r"eps is '1e-06'"),
    "patch a text": encoder(config={"patch_size": "6"}, refused=r"patch_size is '6'"),
    "image a list": encoder(config={"image_size": [24, 24]}, refused=r"image_size is \[24, 24\]"),
    "one channel": encoder(config={"num_channels": 1}, refused=r"num_channels is 1; read are: 3"),
    "swiglu": encoder("dinov2", config={"use_swiglu_ffn": True}, refused=r"use_swiglu_ffn is True"),
    # Tensors.
    "bfloat16": encoder(tensors=_cast(ml_dtypes.bfloat16)),
    "no prefix": encoder(tensors=_renamed(lambda n: n.removeprefix("vision_model."))),
    "position_ids": encoder(
        tensors=lambda t: {**t, "vision_model.embeddings.position_ids": np.arange(16)[None]}
    ),
    "another prefix": encoder(
        tensors=_renamed(lambda n: f"vision_tower.{n}"),
        refused=r"it holds vision_tower\.vision_mod",
    ),
    "a classifier": encoder(
        config={"architectures": ["SiglipForImageClassification"]},
        tensors=lambda t: {**t, "classifier.weight": np.ones((2, 18), np.float32)},
        refused=r"classifier\.weight \(config\.json names the class SiglipForImageClassification;",
    ),
    "clip": encoder(config={"model_type": "clip"}, refused=r"'clip' is not read: .* class token"),
    "registers": encoder(
        "dinov2", config={"model_type": "dinov2_with_registers"}, refused=r"register tokens are not"
    ),
    "registers under another name": encoder(
        "dinov2",
        tensors=lambda t: {**t, "embeddings.register_tokens": np.ones((1, 4, 18), np.float32)},
        refused=r"no parameter of ours is: 1 tensor: embeddings\.register_tokens",
    ),
    "vit": encoder(
        config={"model_type": "vit"}, refused=r"model_type is 'vit'; read are: 'siglip'"
    ),
    # Statistics of pixels.
    "mean and deviation": encoder(pre=IMAGENET),
    "scalars": encoder(pre={"image_mean": 0.4, "image_std": 0.3}),
    "scalars, dinov2": encoder("dinov2", pre={"image_mean": 0.4, "image_std": 0.3}),
    "mean null": encoder(pre={"image_mean": None}, refused=r"image_mean is \(None, None, None\)"),
    "mean alone": encoder(pre={"image_mean": [0.1, 0.2, 0.3]}),
    "not normalised": encoder(pre={**IMAGENET, "do_normalize": False}),
    "not rescaled": encoder(
        pre={"image_mean": [120.0] * 3, "image_std": [60.0] * 3, "do_rescale": False}
    ),
    "rescaled otherwise": encoder(pre={**IMAGENET, "rescale_factor": 1 / 127.5}),
    "rescaled otherwise, not normalised": encoder(
        pre={"rescale_factor": 1 / 127.5, "do_normalize": False}
    ),
    "in processor_config": encoder(processor={"image_processor": IMAGENET}),
    "in both": encoder(pre={"image_mean": 0.9}, processor={"image_processor": IMAGENET}),
    "in both, of transformers 4": encoder(pre=IMAGENET, processor={"processor_class": "Siglip"}),
    "in processor_config, naflex": encoder("naflex", processor={"image_processor": IMAGENET}),
    "an offset": encoder(
        pre={**IMAGENET, "offset": True}, refused=r"offset is True; read are: Fal"
    ),
    "mean a text": encoder(pre={"image_mean": "0.5"}, refused=r"image_mean is \('0\.5', .* number"),
    "mean of two": encoder(pre={"image_mean": [0.5, 0.5]}, refused=r"image_mean is \[0\.5, 0\.5\]"),
    "rescaled to nothing": encoder(pre={"rescale_factor": 0}, refused=r"rescale_factor is 0\.0"),
    "do_normalize a text": encoder(pre={"do_normalize": "no"}, refused=r"do_normalize is 'no'"),
}
