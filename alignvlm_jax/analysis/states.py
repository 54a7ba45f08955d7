"""Hidden states of a model's tokens at the LLM's input and after each of its layers: those of the
visual tokens of pages, and those of the same pages' text.

Only the states of chosen tokens are held, those of a few sequences at a time beside them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from alignvlm_jax.benchmarks import text_bpb
from alignvlm_jax.data import chat, loader, sequences
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.inference.sampler import PROMPT_FIELDS
from alignvlm_jax.models import vlm
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.shapes import Array, Float, Int


def of_text(
    loaded: Loaded,
    pages: Sequence[Record],
    split: str,
    num_states: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns states of the tokens of the pages' text, float32 [L + 1, n, D], and which tokens they
    are of, int [n].

    The text of a page is given to the LLM by itself, words in reading order, and without a chat.

    Raises:
      UserError: no page has words.
    """
    tokenizer = loaded.tokenizer
    begin = chat.begin_ids(tokenizer)
    encoded = [begin + tokenizer.encode(text_bpb.text_of(page)) for page in pages]
    # As long as the longest text needs, up to what the model was trained on.
    window = min(loaded.config.data.seq_len, -(-max(map(len, encoded)) // 64) * 64)
    parts = [part for one in encoded for part in text_bpb.windows(np.array(one, np.int32), window)]
    if not parts:
        raise UserError(
            f"split {split!r} in {loaded.config.data.dir}: none of {len(pages):,} pages knows its "
            "words, whose states visual tokens are compared with"
        )
    rows = loader.stack([sequences.build_text(part, window, tokenizer) for part in parts])
    # The first of a window is the beginning, or the last of the window before, without its context.
    is_used = (rows["segment_ids"] > 0) & (rows["positions"] > 0)
    # What no page shows is in no bank.
    is_used &= ~np.isin(rows["tokens"], list(tokenizer.special_tokens.values()))
    where = np.argwhere(is_used)
    where = where[_sample(len(where), num_states, rng)]
    return _states_at(loaded, rows, where, "texts"), rows["tokens"][tuple(where.T)]


def of_pages(
    loaded: Loaded, pages: Sequence[Record], num_states: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns states of visual tokens in the pages' prompts, float32 [L + 1, n, D], and the numbers
    of their patches, or of what the connector makes of a tile, among those of all tiles, int [n].

    The prompt asks for the text of the page. It follows the page, so that no other question would
    change what its visual tokens are.
    """
    builder = loaded.builder
    prompts = [builder.prompt(page, TRANSCRIBE_QUESTION) for page in pages]
    rows = loader.stack(builder.trim_prompts(prompts))
    # Row after row: the n-th image token of a prompt is that of its n-th patch.
    where = np.argwhere(rows["tokens"] == loaded.config.model.image_token_id)
    chosen = _sample(len(where), num_states, rng)
    states = _states_at(loaded, rows, where[chosen], "pages")
    if "kept_patches" in rows:
        # Of the tiles in use, page after page: blank patches have numbers, and no image tokens.
        kept = rows["kept_patches"][rows["kept_patches"].any(-1)]
        chosen = np.flatnonzero(kept)[chosen]
    return states, chosen


def _states_at(
    loaded: Loaded, rows: PackedSequence, where: Int[np.ndarray, "n 2"], name: str
) -> Float[np.ndarray, "L n D"]:
    """Returns the states of tokens after each layer, given the row and the position of each in
    ascending order."""
    batch = {field: rows[field] for field in PROMPT_FIELDS if field in rows}
    found = []
    start = 0
    # States of all tokens of a few rows are on the host at a time; of these the chosen stay.
    for part in tiles_lib.map_rows(loaded, _states, batch, name):
        inside = where[(where[:, 0] >= start) & (where[:, 0] < start + len(part))]
        # [rows, layers, T, D] at n pairs of a row and a position: [n, layers, D].
        found.append(np.float32(part[inside[:, 0] - start, :, inside[:, 1]]))
        start += len(part)
    return np.ascontiguousarray(np.concatenate(found).swapaxes(0, 1))


def _states(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B L T D"]:
    return vlm.hidden_states(model, variables, batch).swapaxes(0, 1)


def _sample(count: int, most: int, rng: np.random.Generator) -> Int[np.ndarray, "n"]:
    """Returns at most `most` numbers below `count`, ascending."""
    return np.sort(rng.permutation(count)[:most])
