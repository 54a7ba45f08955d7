"""Pages a second from encoded image to arrays: our rows against a torch DataLoader with
transformers' processor.

    make bench-data          (in the venv of `make test-parity`, which has torch and transformers)

The same JPEGs are decoded, cut into the same tiles and brought to the same size, the same questions
and answers are encoded by the same tokenizer, with two threads here and two worker processes there.
What differs: transformers' processor scales and normalises pixels to float32 on the host; here they
stay bytes, and the model does that.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image, ImageDraw

from alignvlm_jax import presets
from alignvlm_jax.config import Config, DataConfig, LLMConfig, ModelConfig, TrainConfig
from alignvlm_jax.data import images, loader, shards
from alignvlm_jax.data import tokenizers as our_tokenizers
from alignvlm_jax.data.record import Record, Turn
from tests.bench import machine

NUM_PAGES = 128
BATCH = 8
WORKERS = 2
ROUNDS = 3
PAGE = (1170, 827)  # A4 at 100 dpi
WORDS = [
    "invoice",
    "total",
    "amount",
    "of",
    "the",
    "customer",
    "number",
    "address",
    "date",
    "paid",
    "on",
    "delivery",
]
QUESTION = "Read the page."
VISION = presets.VISION["siglip_so400m_14_384"]
MAX_TILES = 10


def main() -> None:
    """Prints the table that docs/results.md shows."""
    with tempfile.TemporaryDirectory() as folder:
        records = write_data(Path(folder))
        # Its name says which of two it is: without torchvision transformers takes the one of PIL.
        processor = transformers.SiglipImageProcessor.__name__
        forms = {
            f"torch DataLoader, {processor}": theirs(Path(folder), records),
            "this pipeline": ours(folder),
        }
        rates: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(ROUNDS):
            for name, start in forms.items():
                rates[name].append(rate(start()))
    print(
        f"{NUM_PAGES} pages of {PAGE[1]} x {PAGE[0]}, batches of {BATCH}, {WORKERS} threads or "
        f"workers; median of {ROUNDS}\n"
    )
    print("| | pages a second | of torch's |\n|---|---|---|")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.1f} | {median / next(iter(medians.values())):.2f} |")


def rate(batches: Iterator) -> float:
    """Pages a second, from the second batch on: starting threads and workers is not what is
    asked."""
    next(batches)
    began = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - began)


def write_data(folder: Path) -> list[Record]:
    """Writes pages of random words as JPEGs, and a byte-level tokenizer trained on their texts."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(NUM_PAGES):
        lines = [" ".join(rng.choice(WORDS, 8)) for _ in range(50)]
        page = Image.new("RGB", PAGE[::-1], "white")
        ImageDraw.Draw(page).multiline_text(
            (50, 40), "\n".join(lines), fill="black", font_size=15, spacing=7
        )
        encoded = io.BytesIO()
        page.save(encoded, "JPEG", quality=90)
        turns = (Turn(QUESTION, ("\n".join(lines),)),)
        records.append(Record(f"page-{number}", "bench", (encoded.getvalue(),), turns))
    shards.write_shard(folder / shards.shard_name("train", 0, 1), records)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special_tokens, initial_alphabet=alphabet
    )
    model.train_from_iterator((record.turns[0].answers[0] for record in records), trainer)
    model.save(str(folder / "tokenizer.json"))
    return records


def ours(folder: str):
    """The batches of training, in the threads of the pipeline."""
    tokenizer = our_tokenizers.load(folder)
    slots = MAX_TILES * VISION.num_patches
    config = Config(
        model=ModelConfig(
            vision=VISION, llm=LLMConfig(vocab_size=tokenizer.vocab_size), image_token_id=tokenizer.vocab_size
        ),
        data=DataConfig(
            dir=folder, tasks={"answer": 1.0}, seq_len=slots + 2048, max_tiles=MAX_TILES, use_overview=True,
            num_threads=WORKERS,
        ),
        train=TrainConfig(num_steps=NUM_PAGES // BATCH, batch_size=BATCH),
    )  # fmt: skip
    return lambda: loader.TrainBatches(config)


class Pages(torch.utils.data.Dataset):
    """The same pages, by the libraries of the field."""

    def __init__(self, folder: Path, records: list[Record]):
        self._records = records
        self._processor = transformers.SiglipImageProcessor(
            size={"height": VISION.tile_height, "width": VISION.tile_width},
            resample=Image.Resampling.BICUBIC,
        )
        special_tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        self._tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), pad_token=special_tokens[0]["content"]
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        with Image.open(io.BytesIO(record.images[0])) as image:
            page = image.convert("RGB")
        rows, columns = images.choose_grid(
            page.height, page.width, VISION, MAX_TILES, use_overview=True
        )
        xs, ys = (
            np.linspace(0, size, n + 1, dtype=int)
            for size, n in ((page.width, columns), (page.height, rows))
        )
        crops = [
            page,
            *(
                page.crop((xs[c], ys[r], xs[c + 1], ys[r + 1]))
                for r in range(rows)
                for c in range(columns)
            ),
        ]
        pixels = self._processor(crops, return_tensors="np")["pixel_values"]
        tiles = np.zeros((MAX_TILES, *pixels.shape[1:]), np.float32)
        tiles[: len(pixels)] = pixels
        text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{record.turns[0].answers[0]}<|im_end|>"
        encoded = self._tokenizer(
            text, padding="max_length", max_length=2048, truncation=True, return_tensors="np"
        )
        return {
            "tiles": tiles,
            "tokens": encoded["input_ids"][0],
            "mask": encoded["attention_mask"][0],
        }


def theirs(folder: Path, records: list[Record]):
    """Batches of a DataLoader."""
    pages = Pages(folder, records)
    return lambda: iter(
        torch.utils.data.DataLoader(pages, batch_size=BATCH, num_workers=WORKERS, shuffle=True)
    )


if __name__ == "__main__":
    with machine.watched():
        print(
            f"grain {grain.__version__}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}",
            flush=True,
        )
        main()
