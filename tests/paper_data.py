"""Records as the paper's three data sets have them, as far as their sizes are published: what its
stages are packed by.

Published (dataset cards, evalscope's pages of benchmarks, both as of 2026):

    CC-12M        JPEGs above 400 pixels in both sides, of at most 2.5 to 1; texts of 3 to 256 words;
                  pixparse/cc12m-wds reduces the shorter side to 512 pixels
    BigDocs-7.5M  nine folders; of files of 0.5 GB ArxivOCR has 1,127 and ArxivTableCap 12; tokens in
                  BigDocs-Bench: tables 438 +- 540, captions 94 +- 49, screens 28 to 132
    DocDownstream 570,000 records of ten sets, of which DocVQA trains on 39,463 questions and WTQ on
                  14,149; images of validation DocVQA 593 x 294 to 5367 x 7184, InfographicVQA 600 x
                  340 to 6250 x 9375, of test ChartQA 184 x 326 to 800 x 1796
    Open Images   (TextVQA, TextCaps, TextOCR) 1,024 pixels along the longer side; COCO 640

Everything else is assumed: how often each shape of photo, page or table comes, the resolution of
scans, how large the sets are within theirs, 1.35 tokens a word, and 20 to 27 tokens of chat.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import Config
from alignvlm_jax.data import lengths, packing
from alignvlm_jax.data.index import Index

Rng = np.random.Generator
Drawn = tuple[np.ndarray, np.ndarray]
"""Heights and widths float [n, 2], and tokens of text float [n], without those of the chat."""
CHAT_TOKENS = 24


class Part(NamedTuple):
    """A kind of records: its fraction of all, and what draws so many of them."""

    fraction: float
    draw: Callable[[Rng, int], Drawn]


def draw(data: str, count: int, scale: float = 1.0, text_scale: float = 1.0) -> Index:
    """Returns the index of `count` records of one of `DATA`, an image and an answer each, always
    the same ones; sides of images and lengths of texts may be multiplied."""
    parts = DATA[data]
    rng = np.random.default_rng(0)
    kinds = rng.choice(len(parts), count, p=[part.fraction for part in parts])
    sizes = np.empty((count, 2))
    texts = np.empty(count)
    for number, part in enumerate(parts):
        ours = kinds == number
        sizes[ours], texts[ours] = part.draw(rng, np.count_nonzero(ours))
    return Index(
        {"answer": (texts * text_scale + CHAT_TOKENS).astype(np.int32)},
        np.maximum(np.round(sizes * scale), 1).astype(np.int32),
        np.arange(count + 1),
        np.zeros(count, np.uint64),
        "",
    )


class Padding(NamedTuple):
    """What of an epoch's sequences nothing stands in."""

    records_per_sequence: float
    tokens: float  # fraction of all
    tiles: float  # likewise, of the places for them
    rows: int
    lengths: np.ndarray  # int [records], tokens of each


def padding(config: Config, records: Index) -> Padding:
    """Returns how a stage's real plan places records in its sequences."""
    data = config.data
    limits = lengths.Limits.of(data, config.model.vision, config.tokens_per_tile)
    found = lengths.measure(records, ["answer"], limits)
    tokens = found.tokens[0]
    rows = len(records)
    if data.packing == "offline":
        plan = packing.plan(tokens, found.tiles, data.seq_len, data.max_tiles, [0], 0)
        rows = len(plan.offsets) - 1
    return Padding(
        len(records) / rows,
        1 - tokens.sum() / (rows * data.seq_len),
        1 - found.tiles.sum() / (rows * data.max_tiles),
        rows,
        tokens,
    )


def lognormal(rng: Rng, count: int, mean: float, std: float) -> np.ndarray:
    """Log-normal numbers of this mean and standard deviation."""
    variance = np.log(1 + (std / mean) ** 2)
    return rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), count)


def photos(rng: Rng, shorter: np.ndarray) -> np.ndarray:
    """Sizes of photos, two thirds of them landscape: of square, 4:3, 3:2 or 16:9, a fifth of any
    shape up to 2.5 to 1."""
    shapes = rng.choice([1, 4 / 3, 3 / 2, 16 / 9], len(shorter), p=[0.25, 0.3, 0.33, 0.12])
    is_cut = rng.random(len(shorter)) < 0.2
    longer = shorter * np.where(is_cut, rng.uniform(1, 2.5, len(shorter)), shapes)
    is_wide = rng.random(len(shorter)) < 2 / 3
    return np.where(is_wide, (shorter, longer), (longer, shorter)).T


def downloaded(rng: Rng, count: int) -> Drawn:
    """CC-12M as its images are on the web."""
    shorter = rng.lognormal(np.log(650), 0.45, 4 * count)
    words = np.clip(lognormal(rng, count, 20, 16), 3, 256)
    return photos(rng, shorter[shorter > 400][:count]), 1.35 * words


def reduced(rng: Rng, count: int) -> Drawn:
    """CC-12M as it is packed for use: the shorter side at most 512 pixels."""
    sizes, texts = downloaded(rng, count)
    return sizes * np.minimum(1, 512 / sizes.min(1))[:, None], texts


def open_images(rng: Rng, count: int) -> np.ndarray:
    """Sizes of photos of 1,024 pixels along the longer side."""
    sizes = photos(rng, np.ones(count))
    return 1024 * sizes / sizes.max(1)[:, None]


def pages(rng: Rng, count: int, least: float, most: float) -> np.ndarray:
    """Sizes of letter pages at `least` to `most` pixels an inch."""
    return np.outer(rng.uniform(least, most, count), (11, 8.5))


def tables(rng: Rng, count: int) -> np.ndarray:
    """Sizes of tables cut out of their pages, or drawn alone."""
    heights = np.clip(rng.lognormal(np.log(350), 0.7, count), 40, 3000)
    widths = np.clip(rng.lognormal(np.log(700), 0.4, count), 100, 2000)
    return np.stack([heights, widths], axis=1)


def infographics(rng: Rng, count: int) -> np.ndarray:
    """Sizes of tall pictures."""
    widths = np.clip(rng.lognormal(np.log(1000), 0.4, count), 340, 6250)
    heights = widths * np.clip(rng.lognormal(np.log(2.2), 0.5, count), 0.5, 8)
    return np.stack([heights, widths], axis=1)


def screens(rng: Rng, count: int) -> np.ndarray:
    """Sizes of screens."""
    return np.tile([1080.0, 1920.0], (count, 1))


def part(
    fraction: float, mean: float, std: float, sizes: Callable[..., np.ndarray], *args: float
) -> Part:
    """Returns a part whose texts are log-normal, at least a token long."""

    def both(rng: Rng, count: int) -> Drawn:
        return sizes(rng, count, *args), np.maximum(lognormal(rng, count, mean, std), 1)

    return Part(fraction, both)


def photos_of(rng: Rng, count: int, median: float, spread: float) -> np.ndarray:
    """Sizes of photos, or of charts, whose shorter side is log-normal."""
    return photos(rng, np.clip(rng.lognormal(np.log(median), spread, count), 180, 2000))


DATA: dict[str, tuple[Part, ...]] = {
    "stage1": (Part(1, reduced),),
    "stage1, as downloaded": (Part(1, downloaded),),
    "stage2": (
        part(0.5, 1100, 500, pages, 150, 200),  # ArxivOCR
        part(0.2, 438, 540, tables),  # pubtables-1m
        part(0.05, 94, 49, tables),  # ArxivTableCap, TabFact, WikiTQ
        part(0.05, 80, 80, open_images),  # TextOCR
        part(0.05, 30, 30, photos_of, 480, 0),  # COCOtext
        part(0.1, 300, 200, pages, 100, 150),  # Open4Business, cord-v2
        part(0.05, 60, 50, screens),
    ),
    "stage3": (
        part(0.10, 20, 8, pages, 150, 250),  # DocVQA
        part(0.06, 25, 8, infographics),  # InfographicsVQA
        part(0.07, 25, 8, photos_of, 550, 0.2),  # ChartQA
        part(0.09, 15, 5, open_images),  # TextVQA
        part(0.28, 25, 8, open_images),  # TextCaps
        part(0.05, 40, 15, photos_of, 800, 0.4),  # VisualMRC
        part(0.24, 30, 10, tables),  # TabFact
        part(0.04, 25, 8, tables),  # WikiTableQuestions
        part(0.07, 25, 8, pages, 150, 250),  # DeepForm, KleisterCharity
    ),
}
