"""The tokenizer that belongs to published weights, as files in a folder of its own."""

import shutil
from pathlib import Path

from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import gguf, gguf_tokenizer, towers

NEEDED = ("tokenizer.json", "tokenizer.model")
KEPT = (*NEEDED, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""What an exported model takes along."""


def write(source: str, folder: Path) -> None:
    """Writes the tokenizer of `source` (a folder, a tokenizer's file, a GGUF, or an installed package) into `folder`.

    Raises:
      UserError: there is none.
    """
    path = towers.resolve(source)
    folder.mkdir(parents=True)
    if path.is_file() and gguf.is_gguf(path):
        gguf_tokenizer.write_gguf_tokenizer(gguf.fields(path), folder)
    elif path.is_file():
        shutil.copy(path, folder / ("tokenizer.json" if path.suffix == ".json" else "tokenizer.model"))
    else:
        found = [path / name for name in KEPT if (path / name).is_file()]
        if not any(file.name in NEEDED for file in found):
            raise UserError(f"{path} holds no {' or '.join(NEEDED)}; name the tokenizer by --tokenizer=PATH")
        for file in found:
            shutil.copy(file, folder / file.name)
