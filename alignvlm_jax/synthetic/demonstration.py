"""The demonstration's data set: rendered documents of every split, and a tokenizer trained on
them."""

import functools
import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from alignvlm_jax.data import record as record_lib
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError, how_to_install
from alignvlm_jax.ingest import executors, staging
from alignvlm_jax.synthetic import documents, fonts
from alignvlm_jax.synthetic.contents import Table

SHARD_SIZE = 1000
TOKENIZER_DOCUMENTS = 2000


class Shard(NamedTuple):
    """A shard to write: the file, and the documents `start` to `stop` of a split."""

    path: str
    split: str
    start: int
    stop: int


def prepare(
    out: Path, arguments: dict[str, Any], num_workers: int, overwrite: bool = False
) -> bool:
    """Writes the data set to the folder `out`, or resumes a run that was interrupted; returns False
    where the folder was whole before.

    Args:
      out: the folder.
      arguments: num_train and num_eval (documents of a split), seed and noise; with other values a
        folder holds other data.
      num_workers: processes that render.
      overwrite: whether it may take the place of what other values made.

    Raises:
      UserError: a package is missing, other values made the folder, or a shard cannot be written.
    """
    # The version is part of what identifies the data, so that records of older code are not reused.
    wanted = arguments | {"version": documents.VERSION}
    if staging.is_ready(out, wanted):
        return False
    if not overwrite:
        staging.check_flags(out, wanted, documents.SPLITS)
    folder = staging.partial_folder(out, wanted)
    _write_shards(folder, wanted, num_workers)
    records = RecordSource(folder, "train")
    SentencePieceTokenizer.train(
        folder / "tokenizer.model",
        (
            text
            for index in range(min(TOKENIZER_DOCUMENTS, len(records)))
            for text in _texts(records[index])
        ),
    )
    staging.publish(out, folder, os.listdir(folder), documents.SPLITS, wanted)
    return True


def size(split: str, arguments: dict[str, Any]) -> int:
    """Returns the number of documents of a split."""
    return arguments["num_eval"] if documents.SPLITS[split].evaluation else arguments["num_train"]


def _write_shards(folder: Path, wanted: dict[str, Any], num_workers: int) -> None:
    # A shard appears whole: one that is there need not be written again.
    shards = [shard for shard in _plan(folder, wanted) if not Path(shard.path).exists()]
    if not shards:
        return
    write = functools.partial(_write_shard, wanted["seed"], wanted["noise"], _tables())
    for _ in track(
        executors.run(write, shards, num_workers), "Rendering documents", total=len(shards)
    ):
        pass


def _tables() -> tuple[Table, ...]:
    """Returns the real tables, after a check that all packages for documents are installed: a
    missing font would otherwise show only in a worker."""
    packages = ["pandas", "statsmodels", "vega_datasets", *sorted(fonts.PACKAGES)]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"the demonstration's documents need package {', '.join(missing)}: "
            f"{how_to_install('demo', 'setup')}"
        )
    # Imported here: pandas takes seconds to import, and the workers do not need it.
    from alignvlm_jax.synthetic import tables

    return tables.load()


def _plan(folder: Path, wanted: dict[str, Any]) -> list[Shard]:
    shards = []
    for split in documents.SPLITS:
        # 2,500 documents: 0, 1000, 2000, 2500.
        bounds = [*range(0, size(split, wanted), SHARD_SIZE), size(split, wanted)]
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            name = shards_lib.shard_name(split, index, len(bounds) - 1)
            shards.append(Shard(str(folder / name), split, start, stop))
    return shards


def _write_shard(
    seed: int, noise: float, tables: tuple[Table, ...], shard: Shard
) -> Iterator[None]:
    # A generator, as `executors.run` takes it: each shard yields once, for the progress bar.
    documents_of_shard = range(shard.start, shard.stop)
    shards_lib.write_shard(
        shard.path,
        (documents.render(seed, shard.split, index, tables, noise) for index in documents_of_shard),
    )
    yield


def _texts(record: record_lib.Record) -> list[str]:
    lines = [" ".join(word.text for word in line) for page in record.lines for line in page]
    return lines + [turn.question for turn in record.turns]
