"""`llava`: LLaVA's JSON, an array of objects (or an object a line, in .jsonl):

    {"id": "1", "image": "train/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"},
                                                         {"from": "gpt", "value": "..."}]}

Its ids name images, and come again with every other conversation about them.
"""

import dataclasses
from typing import ClassVar

from alignvlm_jax.data.formats import lines
from alignvlm_jax.data.formats.messages import Keys, Messages


@dataclasses.dataclass(frozen=True)
class Llava(Messages):
    """A JSON file, or a folder of them."""

    keys: ClassVar[Keys] = Keys(
        messages="conversations",
        role="from",
        content="value",
        asker="human",
        answerer="gpt",
        image_mark="<image>",
        suffixes=(".json", *lines.SUFFIXES),
    )
