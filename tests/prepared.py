"""A small prepared data set, rendered once for all tests of a process; and what `prepare` makes of
other sources."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax import config as config_lib
from alignvlm_jax import presets
from alignvlm_jax.data import images, shards
from alignvlm_jax.data import index as index_lib
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer as Tokenizer
from alignvlm_jax.ingest import job
from alignvlm_jax.ingest.formats.base import Format
from alignvlm_jax.synthetic import documents, fonts, snippets, values
from alignvlm_jax.synthetic import pages as pages_lib
from alignvlm_jax.synthetic.contents import Table

NUM_DOCUMENTS = 48


@pytest.fixture(scope="session")
def all_tables() -> tuple[Table, ...]:
    # its packages are not in every environment of the tests
    from alignvlm_jax.synthetic import tables

    return tables.load()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Tokenizer.train(path, ["Total: 123.45", "What is the total?"])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, all_tables) -> Path:
    """Two shards of training documents, one of every other split, their indexes, and a
    tokenizer."""
    path = tmp_path_factory.mktemp("data")
    tokenizer = Tokenizer.train(path / "tokenizer.model", ["Total: 123.45", "What is the total?"])
    for split in documents.SPLITS:
        count = 2 if split == "train" else 1
        for shard in range(count):
            indices = range(shard * NUM_DOCUMENTS // count, (shard + 1) * NUM_DOCUMENTS // count)
            records = [documents.render(0, split, index, all_tables) for index in indices]
            write_shard(path / shards.shard_name(split, shard, count), records, tokenizer)
    return path


def write_shard(path: Path, records: list[Record], tokenizer: Tokenizer) -> None:
    """A shard and its index."""
    shards.write_shard(path, records)
    fingerprint = index_lib.tokenizer_fingerprint(tokenizer.name)
    index_lib.write(
        index_lib.index_path(path), index_lib.of_records(records, tokenizer, fingerprint)
    )


@pytest.fixture
def demo_config(data_dir) -> config_lib.Config:
    """The tiny demonstration's config over `data_dir`."""
    return config_lib.Config(
        model=config_lib.ModelConfig(
            vision=presets.VISION["tiny"], llm=presets.LLM["tiny"], image_token_id=4
        ),
        data=config_lib.DataConfig(
            dir=str(data_dir),
            seq_len=160,
            max_tiles=2,
            tasks={"transcribe": 0.5, "answer": 0.5},
            full_cover=0.125,
            min_token_height=0.0,
            min_contrast=0,
        ),
        optim=config_lib.OptimConfig(learning_rate=2e-3),
        train=config_lib.TrainConfig(num_steps=20, batch_size=8),
        eval=config_lib.EvalConfig(splits=("seen_fonts", "unseen_fonts")),
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A folder that `prepare` wrote."""

    folder: Path

    def records(self, split: str = "train") -> list[Record]:
        if not shards.shard_paths(self.folder, split):
            return []
        source = shards.RecordSource(self.folder, split)
        return [source[i] for i in range(len(source))]

    def rejected(self) -> list[dict[str, str]]:
        return [
            json.loads(line) for line in (self.folder / "rejected.jsonl").read_text().splitlines()
        ]

    def reasons(self) -> dict[str, str]:
        return {line["id"]: line["reason"] for line in self.rejected()}

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def prepare(tmp_path, tokenizer) -> Callable[..., Prepared]:
    def run(
        form: Format,
        source: Path,
        out: str = "out",
        *,
        holdout: float = 0.0,
        num_workers: int = 1,
        **changes,
    ) -> Prepared:
        # Small shards: a few records make several.
        request = job.Request("test", form, str(source), tokenizer.name, holdout, shard_records=10)
        request = dataclasses.replace(request, **changes)
        job.prepare(request, tmp_path / out, job.on_processes(num_workers), True)
        return Prepared(tmp_path / out)

    return run


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    def encode(
        width: int = 3, height: int = 2, shade: int = 255, file_format: str = "PNG"
    ) -> bytes:
        file = io.BytesIO()
        Image.new("L", (width, height), shade).save(file, file_format)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def manuals(tmp_path_factory) -> dict[str, Path]:
    """Folders of pages with words by the flags that name them: "source" has words in lower case,
    and "unseen" others in upper case."""
    folder = tmp_path_factory.mktemp("manuals")
    splits = {"source": {"train": 4, "validation": 2}, "unseen": {"validation": 3}}
    for number, (name, counts) in enumerate(splits.items()):
        rng = np.random.default_rng(number)
        (folder / name).mkdir()
        for split, count in counts.items():
            pages = [_page(f"{name}-{split}-{page + 1:04d}", name, rng) for page in range(count)]
            shards.write_shard(folder / name / shards.shard_name(split, 0, 1), pages)
        (folder / name / "prepare.json").write_text('{"format": "pdf"}')
    return {name: folder / name for name in splits}


def _page(name: str, kind: str, rng: np.random.Generator) -> Record:
    """A page of 20 lines of words and numbers."""
    lines = []
    for _ in range(20):
        words = [
            values.draw("Name" if rng.random() < 0.9 else "Order", rng, False) for _ in "12345"
        ]
        lines.append(" ".join(words).upper() if kind == "unseen" else " ".join(words).lower())
    style = pages_lib.Style(fonts.SEEN["Roboto"][0], 14)
    image, drawn = snippets.text(lines, style, rng)
    return Record(name, "pdf", (images.encode_png(image),), (), (drawn,))
