"""`docdownstream`: DocDownstream-1.0 of mPLUG-DocOwl and its relatives (DocStruct4M, DocReason25K): train.jsonl beside
the folder `imgs`, an object a line:

    {"image": ["./imgs/..."], "messages": [{"role": "user", "content": "<|image|>What ...?"},
                                           {"role": "assistant", "content": "..."}], "dataset_name": "DocVQA", ...}
"""

import dataclasses
from typing import ClassVar

from alignvlm_jax.data.formats import lines
from alignvlm_jax.data.formats.messages import Keys, Messages


@dataclasses.dataclass(frozen=True)
class DocDownstream(Messages):
    """A JSON lines file, or a folder of them."""

    keys: ClassVar[Keys] = Keys(
        messages="messages",
        role="role",
        content="content",
        asker="user",
        answerer="assistant",
        image_mark="<|image|>",
        suffixes=lines.SUFFIXES,
        source="dataset_name",
    )
