"""A sampler that a script answers for, not a model."""

import types
from collections.abc import Callable

import numpy as np


class ScriptedSampler:
    """Every prompt of the n-th prefill, from 1, is answered with `says(n)`; all end at once."""

    def __init__(self, tokenizer, says: Callable[[int], str], data_parallel_size: int):
        self.data_parallel_size = data_parallel_size
        self.end_id = tokenizer.special_tokens["<end>"]
        self.batches = []
        self.length = None
        self._tokenizer = tokenizer
        self._says = says

    def rows_of_process(self, size):
        return np.arange(size)

    def idle(self, size, length, max_new_tokens, *, is_greedy=True):
        self.length = length
        tokens = np.full((size, max(max_new_tokens, 16)), self.end_id)
        return types.SimpleNamespace(tokens_BT=tokens, finished_B=np.ones(size, bool))

    def insert(self, variables, state, batch, rows):
        text = self._says(len(self.batches) + 1)
        self.batches.append(batch)
        tokens = [*self._tokenizer.encode(text), self.end_id]
        used = rows[rows < len(state.tokens_BT)]
        state.tokens_BT[used, : len(tokens)] = tokens
        return state

    def advance(self, variables, state, num_steps, num_working=0):
        return state
