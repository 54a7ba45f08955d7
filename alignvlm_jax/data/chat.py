"""The chat format: `<s> <image>*n <user>QUESTION<assistant>ANSWER<end><user>...`, and which tokens are answers."""

from collections.abc import Iterable

import numpy as np

from alignvlm_jax.data.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer, turns: Iterable[tuple[str, str]], num_image_slots: int, max_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes (question, answer) turns after the image slots. Turns that would not fit `max_length` are left out whole.

    Returns:
      int32 tokens, and bools of the same length that are true on the answers' tokens and the `<end>` of each: what the
      model has to say itself. The mask is built with the tokens, never by searching the text.
    """
    tokens = [tokenizer.bos_id] + [tokenizer.image_id] * num_image_slots
    is_answer = [False] * len(tokens)
    for question, answer in turns:
        prompt = _encode_question(tokenizer, question)
        reply = [*tokenizer.encode(answer), tokenizer.end_id]
        if max_length is None or len(tokens) + len(prompt) + len(reply) <= max_length:
            tokens += prompt + reply
            is_answer += [False] * len(prompt) + [True] * len(reply)
    return np.array(tokens, np.int32), np.array(is_answer, bool)


def encode_prompt(tokenizer: Tokenizer, question: str, num_image_slots: int) -> np.ndarray:
    """Returns int32 tokens that end where the answer is to begin."""
    head, _ = encode_chat(tokenizer, (), num_image_slots)
    return np.append(head, np.array(_encode_question(tokenizer, question), np.int32))


def _encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    return [tokenizer.user_id, *tokenizer.encode(question), tokenizer.assistant_id]
