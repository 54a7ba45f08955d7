"""The folder that `prepare` writes: what is in work lies in a folder within, and moves into place
when it is whole."""

import json
import os
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from alignvlm_jax import storage
from alignvlm_jax.data import index, tokenizers
from alignvlm_jax.data import shards as shards_lib

REJECTED = "rejected.jsonl"


def is_ready(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder holds what is wanted, whole."""
    try:
        return json.loads((out / "prepare.json").read_text()) == wanted
    except (OSError, ValueError):
        return False


def partial_folder(out: Path, wanted: dict[str, Any]) -> Path:
    """Returns the folder where the work on what is wanted lies, also that of a run that was
    interrupted."""
    folder = out / f".partial-{zlib.crc32(json.dumps(wanted, sort_keys=True).encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(
    out: Path, ready: Path, names: Collection[str], splits: Collection[str], wanted: dict[str, Any]
) -> None:
    """Moves the files `names` from `ready` into `out`, in the place of what was prepared there
    before; then comes `prepare.json`, which says that the data is whole. It may be interrupted and
    called again: what is not in `ready` any more has moved already. Shards of other splits are
    somebody else's, and stay."""
    (out / "prepare.json").unlink(missing_ok=True)
    shards = [path for split in splits for path in shards_lib.shard_paths(out, split)]
    others = [out / name for name in (REJECTED, *tokenizers.NAMES, tokenizers.CHAT_FORMAT)]
    others += [
        out / name
        for split in splits
        for name in (index.merged_name(split), shards_lib.table_name(split))
    ]
    for old in (*shards, *map(index.index_path, shards), *others):
        if old.name not in names:
            old.unlink(missing_ok=True)
    for name in names:
        if (ready / name).exists():
            os.replace(ready / name, out / name)
    write_json(out / "prepare.json", wanted)
    # After all: of work that is deleted in part nothing could go on.
    for leftover in out.glob(".partial-*"):
        shutil.rmtree(leftover)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, beside `path` first: a file of that name is always whole."""
    storage.write_whole(path, json.dumps(value, indent=2) + "\n")
