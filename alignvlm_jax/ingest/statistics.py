"""What a prepared folder holds, in numbers: lengths, images, tiles, what was rejected and why."""

import collections
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.data import index, lengths, mixture, packing
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.index import Index
from alignvlm_jax.data.lengths import Limits, Tiling
from alignvlm_jax.data.tasks import TASKS
from alignvlm_jax.errors import counted
from alignvlm_jax.ingest import staging, writer

MAX_REASONS = 30
MAX_PLANNED = 100_000
"""Records from which packing is estimated: with a million a plan takes seconds."""
LENGTH_FACTORS = (0.5, 1.5, 2.0)
"""Other lengths of packed sequences that are tried, as factors of the present one."""
RECORDS_EACH = (2, 3, 4, 6)
"""Those that are tried besides: so many of the longer records, at the 95th percentile."""
ASPECTS = (1.0, 1.414, 1 / 1.414, 1.294, 1 / 1.294)
"""Heights of tiles by their widths that are tried: square, and A4 and Letter either way up."""
SAME_DETAIL = 0.97
"""Fraction of the present resolution at which a page counts as seen in the same detail."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of one split of one folder.

    Attributes:
      distributions: by what is counted a value for each of `COLUMNS`.
      facts: single numbers, in words.
      rejected: records of the whole folder by reason, the most frequent first.
      packing_efficiency: fraction of the positions of an epoch's packed sequences that hold tokens;
        None without offline packing.
      advice: what other settings would make of it.
    """

    COLUMNS: ClassVar = ("mean", "median", "95th percentile", "largest", "records", "sum")
    name: str
    directory: str
    num_records: int
    distributions: Mapping[str, tuple[float, ...]]
    facts: Mapping[str, str]
    rejected: Mapping[str, int]
    packing_efficiency: float | None
    advice: tuple["Advice", ...] = ()


class Advice(NamedTuple):
    """What other settings would make of a split, the present ones first.

    Attributes:
      title: what is compared.
      columns: names of what is measured.
      rows: the settings, each with its name and a text a column.
      conclusion: a sentence with the fields to set, or that nothing is better.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    conclusion: str


def collect(
    builder: ExampleBuilder, directory: str, split: str, packing_efficiency: float | None
) -> Statistics:
    """Returns the statistics of a split as the sequences of a builder would have it.

    Raises:
      UserError: there is no such split, or no index beside its shards; the message says what to
        call.
    """
    known = index.load(directory, split)
    measured = None
    # Text lines are known of pixels alone, which an index has not.
    if builder.data.tiling == "grid":
        limits = Limits.of(builder.data, builder.vision, builder.tokens_per_tile)
        measured = lengths.measure(known, list(TASKS), limits)
    values = {f"text tokens, {task}": tokens for task, tokens in known.text_tokens.items()}
    values |= {
        "images a record": np.diff(known.image_starts),
        "image height, pixels": known.image_sizes[:, 0],
        "image width, pixels": known.image_sizes[:, 1],
    }
    advice: tuple[Advice | None, ...] = ()
    if measured:
        values["tiles a record"] = measured.tiles
    # How many patches are blank is known of pixels alone.
    if measured and not builder.data.blank_contrast:
        # Of the stage's own tasks: with its lengths, rows of others would be cut as none ever is.
        # An index has the tokens of texts that are not spelled.
        values |= {
            f"row tokens, {task}": tokens
            for task, tokens in zip(TASKS, measured.tokens, strict=True)
            if builder.data.tasks.get(task) and builder.data.text_unit == "token"
        }
        advice = _tile_advice(known, builder), _length_advice(known, measured.tokens, builder)
    return Statistics(
        name=split,
        directory=directory,
        num_records=len(known),
        distributions={name: _distribution(found) for name, found in values.items() if found.any()},
        facts=_facts(known, builder),
        rejected=rejected(directory),
        packing_efficiency=packing_efficiency,
        advice=tuple(filter(None, advice)),
    )


def rejected(directory: str | Path) -> dict[str, int]:
    """Returns how many records `prepare` rejected by reason, the most frequent first.

    Without a list of them none.
    """
    path = Path(directory, staging.REJECTED)
    reasons = collections.Counter(counts(directory).get("rejected", {}))
    # Folders of earlier versions have the list alone.
    if not reasons and path.exists():
        # What stands in parentheses is of one record.
        heads = (line["reason"].split(" (")[0] for line in writer.read_lines(path))
        reasons = collections.Counter(heads)
    listed = dict(reasons.most_common(MAX_REASONS))
    rest = reasons.total() - sum(listed.values())
    return listed | ({"other reasons": rest} if rest else {})


def joined(directory: str | Path) -> tuple[int, int]:
    """Returns how many records `prepare` has put into others about the same images, and into how
    many."""
    found = counts(directory)
    return found.get("joined", 0), found.get("into", 0)


def counts(directory: str | Path) -> dict[str, Any]:
    """Returns the numbers of `staging.COUNTS`; none of a folder of an earlier version."""
    path = Path(directory, staging.COUNTS)
    return json.loads(path.read_text()) if path.exists() else {}


def _distribution(values: np.ndarray) -> tuple[float, ...]:
    """Returns the numbers of COLUMNS, of values above 0: a record that lacks what a task needs is
    none of its records."""
    present = values[values > 0]
    return (
        round(float(present.mean()), 1),
        round(float(np.median(present))),
        round(float(np.percentile(present, 95))),
        int(present.max()),
        len(present),
        int(present.sum(dtype=np.int64)),
    )


def _facts(known: Index, builder: ExampleBuilder) -> dict[str, str]:
    vision = builder.vision
    data = builder.data
    doubles = len(known.content_hash) - len(np.unique(known.content_hash))
    return {
        "Rows": f"{data.seq_len:,} tokens, {counted(data.max_tiles, 'tile')} of "
        f"{vision.tile_width} × {vision.tile_height} pixels with "
        f"{counted(builder.tokens_per_tile, 'image token')} each"
        f"{', less those of blank patches' if data.blank_contrast else ''}",
        "Tiles of a record": f"at most {data.tiles_of_a_record}"
        f"{', the overview first' if data.use_overview else ''}"
        f"{', by its text lines' if data.tiling == 'lines' else ''}",
        "Tokens counted by": f"tokenizer {known.tokenizer}"
        f"{', before texts are spelled' if data.text_unit == 'letter' else ''}",
        "Same content twice": counted(doubles, "record"),
    }


def _tile_advice(known: Index, builder: ExampleBuilder) -> Advice | None:
    """Returns what other numbers and shapes of tiles would make of a split's pages; None without
    any."""
    data = builder.data
    sizes = known.image_sizes
    if not len(sizes):
        return None
    rng = np.random.default_rng(0)
    sizes = sizes if len(sizes) <= MAX_PLANNED else sizes[rng.permutation(len(sizes))[:MAX_PLANNED]]
    most = data.tiles_of_a_record
    now = lengths.tiling(sizes, builder.vision, most, data.use_overview)
    # As many tiles as now in another shape, and a few more or less in any.
    counts = range(max(1, most - 4), most + 4)
    shapes = dict.fromkeys([builder.vision, *(_shaped(builder.vision, side) for side in ASPECTS)])
    tried = [
        lengths.tiling(sizes, shape, count, data.use_overview)
        for shape in shapes
        for count in counts
    ]
    # By shape that which takes the fewest tokens to show a page as it is shown now.
    same = [one for one in tried if one.detail >= SAME_DETAIL * now.detail]
    best = [
        min(alike, key=lambda one: one.tokens)
        for shape in shapes
        if (alike := [one for one in same if one.vision == shape])
    ]
    fewest = min(best, key=lambda one: one.tokens)
    conclusion = f"{now.padding:.0%} of its image tokens lie on no page; "
    if fewest.tokens < SAME_DETAIL * now.tokens:
        fields = _tile_fields(fewest, now, "record_tiles" if data.record_tiles else "max_tiles")
        conclusion += (
            f"{fields} shows the pages in the same detail with "
            f"{1 - fewest.tokens / now.tokens:.0%} fewer, {fewest.padding:.0%} of them on no page"
        )
        if fewest.vision != builder.vision:
            conclusion += "; an encoder that is loaded has to take tiles of another shape"
    else:
        conclusion += "no other tiles show the pages in the same detail with fewer"
    # The same shape with fewer and more tiles, for those who would give or have detail.
    others = [one for one in tried if one.vision == builder.vision and one.max_tiles != most]
    rows: dict[tuple, Tiling] = {}
    for one in [now, *sorted(best, key=lambda one: one.tokens), *others]:
        # Of numbers that come to the same the first.
        rows.setdefault((one.vision, *one[2:]), one)
    columns = ("tiles at most", "patches a page", "on no page", "detail")
    return Advice("Tiles", columns, tuple(map(_tile_row, rows.values())), conclusion)


def _shaped(vision: VisionConfig, aspect: float) -> VisionConfig:
    """Returns tiles of about as many patches whose height is `aspect` times their width."""
    width = (vision.num_patches * vision.patch_height / vision.patch_width / aspect) ** 0.5
    columns = max(1, round(width))
    rows = max(1, round(columns * aspect * vision.patch_width / vision.patch_height))
    return dataclasses.replace(
        vision, tile_height=rows * vision.patch_height, tile_width=columns * vision.patch_width
    )


def _tile_fields(one: Tiling, now: Tiling, count: str) -> str:
    """Returns what of a config makes `now` another tiling."""
    fields = []
    if one.max_tiles != now.max_tiles:
        fields.append(f"data.{count}={one.max_tiles}")
    if one.vision != now.vision:
        fields.append(f"model.vision.tile_height={one.vision.tile_height}")
        fields.append(f"model.vision.tile_width={one.vision.tile_width}")
    return " ".join(fields)


def _tile_row(one: Tiling) -> tuple[str, ...]:
    return (
        f"{one.vision.tile_height} × {one.vision.tile_width}",
        f"{one.max_tiles}",
        f"{one.tokens:,.0f}",
        f"{one.padding:.1%}",
        f"{one.detail:.2f}",
    )


def _length_advice(known: Index, tokens: np.ndarray, builder: ExampleBuilder) -> Advice | None:
    """Returns how full packed sequences of other lengths would be; None without offline packing, or
    where nothing is of use to the tasks. `tokens` are those of `TASKS` now, int32 [tasks, R]."""
    data = builder.data
    if data.packing != "offline":
        return None
    # Drawn before anything is measured at other lengths, of which use to a task does not depend.
    of_use = [found > 0 for task, found in zip(TASKS, tokens, strict=True) if data.tasks.get(task)]
    rng = np.random.default_rng(0)
    usable = rng.permutation(np.flatnonzero(np.logical_or.reduce(of_use)))[:MAX_PLANNED]
    if not len(usable):
        return None
    known = index.select(known, usable)
    draws = rng.random(len(usable))
    now = _packed(known, draws, builder, data.seq_len)
    wanted = [data.seq_len * factor for factor in LENGTH_FACTORS]
    wanted += [now.long * number for number in RECORDS_EACH]
    # Multiples of 128, as accelerators like them.
    seq_lens = sorted({max(128, -(-int(length) // 128) * 128) for length in wanted})
    others = [
        _packed(known, draws, builder, length) for length in seq_lens if length != now.seq_len
    ]
    # A shorter sequence that cuts off more of the records would be fuller for nothing.
    kept = [one for one in others if one.num_cut <= now.num_cut]
    best = max([now, *kept], key=lambda one: one.efficiency)
    conclusion = f"data.seq_len={now.seq_len} packs as well as any"
    if best.efficiency > now.efficiency + 0.005:
        conclusion = (
            f"data.seq_len={best.seq_len} data.max_tiles={best.max_tiles} packs best: "
            f"{best.efficiency:.1%} of the positions hold tokens, {now.efficiency:.1%} now"
        )
    rows = tuple(
        (
            f"{one.seq_len:,}",
            f"{one.max_tiles}",
            f"{one.efficiency:.1%}",
            f"{one.records:.1f}",
            f"{one.num_cut:,}",
        )
        for one in [now, *others]
    )
    columns = ("max_tiles", "full", "records each", "records cut")
    return Advice("Length of packed sequences", columns, rows, conclusion)


class _Packed(NamedTuple):
    """An epoch of packed sequences of a length."""

    seq_len: int
    max_tiles: int
    efficiency: float
    records: float  # of a sequence
    num_cut: int  # records that are as long as a sequence or longer
    long: float  # tokens of a record at the 95th percentile


def _packed(known: Index, draws: np.ndarray, builder: ExampleBuilder, seq_len: int) -> _Packed:
    """Returns an epoch of sequences of another length, with as many more tiles.

    Each of the N records is of use; `draws` [N], from 0 to 1, choose their tasks.
    """
    data = builder.data
    max_tiles = max(data.tiles_of_a_record, -(-data.max_tiles * seq_len // data.seq_len))
    of_records = dataclasses.replace(data, seq_len=seq_len, record_tiles=data.tiles_of_a_record)
    limits = Limits.of(of_records, builder.vision, builder.tokens_per_tile)
    tasks, fractions = mixture.task_fractions(data.tasks)
    measured = lengths.measure(known, tasks, limits)
    # A task for each record, of those that it has text for, by their weights.
    weights = fractions[:, None] * (measured.tokens > 0)
    bounds = weights.cumsum(0)
    chosen = (draws * bounds[-1] >= bounds).sum(0)
    tokens = measured.tokens[chosen, np.arange(len(known))]
    tiles = measured.tiles.astype(np.int64)
    plan = packing.plan(tokens, tiles, seq_len, max_tiles, [0], 0)
    count = len(plan.offsets) - 1
    return _Packed(
        seq_len,
        max_tiles,
        float(tokens.sum() / (count * seq_len)),
        len(known) / count,
        int((tokens >= seq_len).sum()),
        float(np.percentile(tokens, 95)),
    )
