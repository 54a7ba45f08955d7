"""`prepare`: renders the demonstration's documents and trains its tokenizer."""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from rich.progress import track

from alignvlm_jax.data import documents, sources
from alignvlm_jax.data.contents import Table
from alignvlm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from alignvlm_jax.data.sources import RecordSource
from alignvlm_jax.errors import UserError

SHARD_SIZE = 1000
TOKENIZER_DOCUMENTS = 2000


@dataclasses.dataclass(frozen=True)
class Shard:
    """A run of documents of one split, and the file that they go to."""

    path: str
    split: str
    start: int
    stop: int


def main(argv: list[str]) -> None:
    args = _parse(argv)
    out = Path(args.out)
    wanted = {name: value for name, value in vars(args).items() if name not in ("out", "num_workers")}
    wanted["version"] = documents.VERSION
    if _read_json(out / "prepare.json") == wanted:
        print(f"{out} is ready: prepared with these arguments before")
        return
    started = time.monotonic()
    try:
        _prepare(out, wanted, args.num_workers)
    except OSError as err:
        raise UserError(f"cannot write {out}: {err.strerror or err}") from err
    except KeyboardInterrupt as err:
        raise UserError("interrupted; the same command goes on with what is done") from err
    sizes = ", ".join(f"{split} {_size(split, wanted)}" for split in documents.SPLITS)
    print(f"{out}: documents by split: {sizes}; {time.monotonic() - started:.0f} s")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alignvlm_jax prepare", description=__doc__)
    parser.add_argument("--format", default="documents", choices=["documents"], help="kind of data")
    parser.add_argument("--out", default="data/demo", help="folder to write")
    parser.add_argument("--num_train", type=_at_least(int, 1), default=16_000, help="documents of each training split")
    parser.add_argument("--num_eval", type=_at_least(int, 1), default=512, help="documents of each evaluation split")
    parser.add_argument("--seed", type=_at_least(int, 0), default=0)
    parser.add_argument(
        "--noise", type=_at_least(float, 0), default=0.0, help="strength of scan noise; 1 is a bad scan"
    )
    parser.add_argument(
        "--num_workers", type=_at_least(int, 1), default=2, help="processes; changes no byte of the data"
    )
    return parser.parse_args(argv)


def _at_least(kind: type, minimum: int) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        return value

    number.__name__ = kind.__name__  # argparse shows it for what is no number
    return number


def _prepare(out: Path, wanted: dict, num_workers: int) -> None:
    """Writes all into a folder named after the arguments, where an interrupted run finds its shards again, then moves
    it into place. `prepare.json`, which says that the data is whole, comes last."""
    staging = out / f".partial-{zlib.crc32(json.dumps(wanted, sort_keys=True).encode()):08x}"
    staging.mkdir(parents=True, exist_ok=True)
    _write_shards(staging, wanted, num_workers)
    records = RecordSource(staging, "train")
    SentencePieceTokenizer.train(
        staging / "tokenizer.model",
        (text for index in range(min(TOKENIZER_DOCUMENTS, len(records))) for text in _texts(records[index])),
    )
    (out / "prepare.json").unlink(missing_ok=True)
    for split in documents.SPLITS:  # Shards of other splits are somebody else's.
        for old in sources.shard_paths(out, split):
            old.unlink()
    for new in staging.iterdir():
        os.replace(new, out / new.name)
    for leftover in out.glob(".partial-*"):
        shutil.rmtree(leftover)
    beside = out / "prepare.json.tmp"
    beside.write_text(json.dumps(wanted, indent=2) + "\n")
    os.replace(beside, out / "prepare.json")


def _write_shards(staging: Path, wanted: dict, num_workers: int) -> None:
    shards = [shard for shard in _plan(staging, wanted) if not Path(shard.path).exists()]
    if not shards:
        return
    from alignvlm_jax.data import tables  # pandas takes seconds to import, and the workers do not need it

    # Spawned, not forked: a caller may hold threads (jax, grain) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    settings = (wanted["seed"], wanted["noise"], tables.load())
    # Ctrl-C reaches the whole process group. Workers inherit that it is ignored: the parent alone speaks and ends them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        workers = context.Pool(min(num_workers, len(shards)), _start_worker, settings)
    finally:
        signal.signal(signal.SIGINT, handler)
    with workers as pool:
        for _ in track(pool.imap_unordered(_write_shard, shards), "Rendering documents", total=len(shards)):
            pass


def _plan(staging: Path, wanted: dict) -> list[Shard]:
    shards = []
    for split in documents.SPLITS:
        bounds = [*range(0, _size(split, wanted), SHARD_SIZE), _size(split, wanted)]
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            name = sources.shard_name(split, index, len(bounds) - 1)
            shards.append(Shard(str(staging / name), split, start, stop))
    return shards


def _size(split: str, wanted: dict) -> int:
    return wanted["num_eval"] if documents.SPLITS[split].evaluation else wanted["num_train"]


_settings: tuple[int, float, tuple[Table, ...]]


def _start_worker(seed: int, noise: float, tables: tuple[Table, ...]) -> None:
    global _settings
    _settings = seed, noise, tables


def _write_shard(shard: Shard) -> None:
    seed, noise, tables = _settings
    sources.write_shard(
        shard.path,
        (documents.render(seed, shard.split, index, tables, noise) for index in range(shard.start, shard.stop)),
    )


def _texts(record) -> list[str]:
    lines = [" ".join(word.text for word in line) for page in record.lines for line in page]
    return lines + [turn.question for turn in record.turns]


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
