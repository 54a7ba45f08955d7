"""What a prepared folder holds, in numbers: lengths, images, tiles, what was rejected and why."""

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from alignvlm_jax.data import index, lengths
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.index import Index
from alignvlm_jax.data.lengths import Limits
from alignvlm_jax.data.tasks import TASKS
from alignvlm_jax.errors import counted
from alignvlm_jax.ingest import staging, writer

MAX_REASONS = 30


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of one split of one folder.

    Attributes:
      distributions: by what is counted a value for each of `COLUMNS`.
      facts: single numbers, in words.
      rejected: records of the whole folder by reason, the most frequent first.
      packing_efficiency: fraction of the positions of an epoch's packed sequences that hold tokens;
        None without offline packing.
    """

    COLUMNS: ClassVar = ("mean", "median", "95th percentile", "largest", "records", "sum")
    name: str
    directory: str
    num_records: int
    distributions: Mapping[str, tuple[float, ...]]
    facts: Mapping[str, str]
    rejected: Mapping[str, int]
    packing_efficiency: float | None


def collect(
    builder: ExampleBuilder, directory: str, split: str, packing_efficiency: float | None
) -> Statistics:
    """Returns the statistics of a split as the sequences of a builder would have it.

    Raises:
      UserError: there is no such split, or no index beside its shards; the message says what to
        call.
    """
    known = index.load(directory, split)
    limits = Limits.of(builder.data, builder.vision, builder.tokens_per_tile)
    measured = lengths.measure(known, list(TASKS), limits)
    values = {f"text tokens, {task}": tokens for task, tokens in known.text_tokens.items()}
    values |= {
        "images a record": np.diff(known.image_starts),
        "image height, pixels": known.image_sizes[:, 0],
        "image width, pixels": known.image_sizes[:, 1],
        "tiles a record": measured.tiles,
    }
    # Of the stage's own tasks: with its lengths, rows of others would be cut as none ever is.
    values |= {
        f"row tokens, {task}": tokens
        for task, tokens in zip(TASKS, measured.tokens, strict=True)
        if builder.data.tasks.get(task)
    }
    return Statistics(
        name=split,
        directory=directory,
        num_records=len(known),
        distributions={name: _distribution(found) for name, found in values.items() if found.any()},
        facts=_facts(known, builder),
        rejected=rejected(directory),
        packing_efficiency=packing_efficiency,
    )


def rejected(directory: str | Path) -> dict[str, int]:
    """Returns how many records `prepare` rejected by reason, the most frequent first.

    Without a list of them none.
    """
    path = Path(directory, staging.REJECTED)
    if not path.exists():
        return {}
    # What stands in parentheses is of one record.
    reasons = collections.Counter(line["reason"].split(" (")[0] for line in writer.read_lines(path))
    listed = dict(reasons.most_common(MAX_REASONS))
    rest = reasons.total() - sum(listed.values())
    return listed | ({"other reasons": rest} if rest else {})


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
        f"{counted(builder.tokens_per_tile, 'image token')} each",
        "Tiles of a record": f"at most {data.tiles_of_a_record}"
        f"{', the overview first' if data.use_overview else ''}",
        "Tokens counted by": f"tokenizer {known.tokenizer}",
        "Same content twice": counted(doubles, "record"),
    }
