"""Responses as OpenAI's API has them."""

from collections.abc import Mapping, Sequence
from typing import Any


def completion(
    id_: str, created: int, model: str, text: str, finish_reason: str, usage: Mapping[str, int]
) -> dict[str, Any]:
    """Returns a whole answer as OpenAI's API says it."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return _head(id_, created, model, "chat.completion") | {
        "choices": [choice],
        "usage": dict(usage),
    }


def chunk(
    id_: str,
    created: int,
    model: str,
    delta: Mapping[str, str],
    finish_reason: str | None = None,
) -> dict[str, Any]:
    """Returns a piece of an answer that is streamed."""
    choice = {
        "index": 0,
        "delta": dict(delta),
        "finish_reason": finish_reason,
        "logprobs": None,
    }
    return _head(id_, created, model, "chat.completion.chunk") | {"choices": [choice]}


def usage_chunk(id_: str, created: int, model: str, usage: Mapping[str, int]) -> dict[str, Any]:
    """Returns the last piece of a stream, with the numbers of tokens and no text."""
    return _head(id_, created, model, "chat.completion.chunk") | {
        "choices": [],
        "usage": dict(usage),
    }


def usage(num_prompt: int, num_answer: int) -> dict[str, int]:
    """Returns the numbers of tokens of a prompt and its answer."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """Returns the list of models."""
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": created, "owned_by": "alignvlm_jax"}
            for name in names
        ],
    }


def _head(id_: str, created: int, model: str, kind: str) -> dict[str, Any]:
    return {"id": id_, "object": kind, "created": created, "model": model}
