"""The conversion of a GGUF file's tokenizer to a tokenizer file of its kind."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from alignvlm_jax.data import tokenizers
from alignvlm_jax.data.tokenizers.tiktoken import PATTERN
from alignvlm_jax.errors import UserError, nearest

CONTROL = 3
USER_DEFINED = 4
"""Values of `tokenizer.ggml.token_type`; types are those of SentencePiece: normal, unknown,
control, user-defined, ..."""

# Pre-tokenizers, which split a text before bytes are merged, by `tokenizer.ggml.pre`.
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = _split_by(PATTERN)
PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    # As Llama 3's, with each digit by itself.
    "qwen2": _split_by(PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")),
    "gpt-2": _BYTES,
}


def write_gguf_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """Writes the tokenizer that a GGUF's metadata describe into `folder`: as tokenizer.json for
    byte-level BPE, as tokenizer.model for SentencePiece; and its chat template, where it has one.

    Raises:
      UserError: the kind of tokenizer, or its pre-tokenizer, is unknown.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        _byte_level(fields).save(str(folder / "tokenizer.json"))
    elif kind == "llama":
        (folder / "tokenizer.model").write_bytes(_sentencepiece(fields))
    else:
        raise UserError(f"tokenizer.ggml.model is {kind!r}{nearest(str(kind), ('gpt2', 'llama'))}")
    if template := fields.get("tokenizer.chat_template"):
        (folder / tokenizers.TEMPLATE).write_text(template)
        settings = json.dumps(dict(_named_tokens(fields)), indent=2)
        (folder / tokenizers.SETTINGS).write_text(f"{settings}\n")


def _named_tokens(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The tokens that a template names, by their names there."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for theirs, ours in names.items():
        token = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            yield f"{ours}_token", fields["tokenizer.ggml.tokens"][token]


def _byte_level(fields: Mapping[str, Any]) -> Tokenizer:
    """Returns the byte-level BPE tokenizer of the metadata."""
    pre = fields.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise UserError(f"tokenizer.ggml.pre is {pre!r}{nearest(str(pre), PRE_TOKENIZERS)}")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    # Byte-level tokens hold no space: the one that there is parts the two that merge.
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    # In Llama 3, a pre-token that is in the vocabulary is one token, even where the merges would
    # not arrive at it.
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre.startswith("llama")
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    by_kind = {
        kind: [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, its_kind in zip(tokens, types, strict=True)
            if its_kind == kind
        ]
        for kind in (CONTROL, USER_DEFINED)
    }
    tokenizer.add_special_tokens(by_kind[CONTROL])
    # Such as <think>: one token wherever a text spells it.
    tokenizer.add_tokens(by_kind[USER_DEFINED])
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any]) -> bytes:
    """Returns a serialised SentencePiece model of the metadata.

    GGUF keeps the pieces and drops the trainer's settings: those set here are Llama's, BPE with
    byte fallback and no normalisation.
    """
    model = sentencepiece_model.ModelProto()
    columns = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=token, score=score, type=int(kind))
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = fields.get("tokenizer.ggml.unknown_token_id", 0)
    model.trainer_spec.bos_id = fields.get("tokenizer.ggml.bos_token_id", 1)
    model.trainer_spec.eos_id = fields.get("tokenizer.ggml.eos_token_id", 2)
    model.trainer_spec.pad_id = -1  # None, as SentencePiece says it.
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(
        fields.get("tokenizer.ggml.add_space_prefix", True)
    )
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()
