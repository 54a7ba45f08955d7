"""What `prepare` tells of a folder that it wrote, in a few lines of text."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.data import index
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.errors import UserError, counted
from alignvlm_jax.ingest import exclude, staging, statistics
from alignvlm_jax.ingest import writer as writer_lib


def of(out: Path, splits: Sequence[str] = writer_lib.SPLITS) -> str:
    """Returns a description of a prepared folder in a few lines.

    It has the number of records, images and documents by split, the tokens by task, and the number
    of rejected records by reason with where the first one lies.
    """
    text = []
    documents = _documents(out)
    # What is held out together, as --holdout_by has it.
    noun = {"page": "page", "folder": "folder"}.get(
        staging.description(out).get("holdout_by"), "document"
    )
    tasks: dict[str, set[str]] = {}
    for split in splits:
        if not shards_lib.shard_paths(out, split):
            continue
        known = index.load(out, split)
        images = counted(len(known.image_sizes), "image")
        whence = f", from {counted(documents[split], noun)}" if split in documents else ""
        text.append(f"{split}: {counted(len(known), 'record')}, {images}{whence}")
        for task, lengths in known.text_tokens.items():
            used = lengths[lengths > 0]  # 0 stands for a record without this task
            if len(used):
                tasks.setdefault(split, set()).add(task)
                text.append(
                    f"  {task}: {counted(len(used), 'record')}, tokens mean "
                    f"{used.mean():.0f}, max {used.max():,}"
                )
    # A single --split is for evaluation, and lacks nothing.
    if tuple(splits) == writer_lib.SPLITS:
        text += _lacking(out, tasks)
    num_joined, num_joining = statistics.joined(out)
    if num_joined:
        text.append(
            f"{num_joined + num_joining:,} records about the same images share "
            f"{counted(num_joining, 'record')}, their questions one after another "
            "(--no-group_by_image keeps them apart)"
        )
    reasons = statistics.rejected(out)
    # Also where there are none: that nothing is missing is what one wants to read.
    text.append(
        f"rejected: {sum(reasons.values()):,}"
        + (f" (see {out / staging.REJECTED})" if reasons else "")
    )
    first = _first_rejected(out)
    for reason, count in reasons.items():
        where = f"; {'' if count == 1 else 'first '}{first[reason]}" if reason in first else ""
        text.append(f"  {count:,}: {reason}{where}")
    text += exclude.told(reasons, writer_lib.read_lines(out / staging.REJECTED))
    return "\n".join(text)


def _lacking(out: Path, tasks: Mapping[str, Collection[str]]) -> list[str]:
    """Returns lines about what training or validation lacks of the tasks that the other has."""
    train, validation = (tasks.get(split, ()) for split in writer_lib.SPLITS)
    if not validation:
        return [_without_validation(out)]
    if not train:
        return ["train: none, all is held out or shows its images; take a smaller --holdout"]
    return [
        f"{split}: no record has text for {task}, which {other} has; another --holdout may help"
        for split, here, other, there in (
            ("validation", validation, "train", train),
            ("train", train, "validation", validation),
        )
        for task in ("transcribe", "answer")
        if task in there and task not in here
    ]


def _without_validation(out: Path) -> str:
    """Returns a line about a folder of which nothing is held out, and what to do about it."""
    done = staging.description(out)
    if done.get("holdout") == 0:
        return "validation: none, since --holdout is 0; `train` needs some, as of --holdout=0.02"
    remedy = "give more documents"
    if done.get("holdout_by") == "document":
        remedy = "--holdout_by=page holds out a page where there are two"
    elif done.get("format") == "jsonl":
        remedy = "give records that are no page of it a `document` of their own"
    return (
        f"validation: none, no document could be held out (one document?); {remedy}, or train with "
        "--config.data.validation_split=train, which measures on what is trained"
    )


def hashes(out: Path, splits: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the content hashes of the records of each split, uint64 [N]; of one that a folder
    lacks, or whose index cannot be read, none."""
    found = dict.fromkeys(splits, np.zeros(0, np.uint64))
    for split in splits:
        with contextlib.suppress(UserError):
            if shards_lib.shard_paths(out, split):
                found[split] = index.load(out, split).content_hash
    return found


def moved(before: Mapping[str, np.ndarray], out: Path) -> str:
    """Returns a line about the records that a job has given to another split, or that are no more;
    "" where `before`, the `hashes` of the folder until then, are where they were."""
    after = hashes(out, [*before])
    told = []
    for split, ours in before.items():
        # By content, not by id: an id may number the pages of a folder that has grown.
        left = np.setdiff1d(ours, after[split])
        # Of equal records in both splits neither has moved.
        arrived = {
            other: np.setdiff1d(theirs, before[other])
            for other, theirs in after.items()
            if other != split
        }
        changes = {f"now in {other}": np.isin(left, new).sum() for other, new in arrived.items()}
        changes["gone or changed"] = len(left) - sum(changes.values())
        parts = [f"{count:,} {what}" for what, count in changes.items() if count]
        if parts:
            told.append(f"of {counted(len(ours), 'record')} of {split} {' and '.join(parts)}")
    if not told:
        return ""
    return f"{out} held other data before: {'; '.join(told)}; runs on it are best begun anew"


def reasons(folder: Path) -> str:
    """Returns why no record can be used, for a message: the first reason, and how many others."""
    first = next(writer_lib.read_lines(folder / staging.REJECTED), None)
    if first is None:
        return ": its files hold none at all"
    counts = statistics.rejected(folder)
    others = f" for {len(counts)} reasons" if len(counts) > 1 else ""
    return (
        f": {first['reason']} ({_where(first)}; {sum(counts.values()):,} rejected{others}, "
        f"see {folder / staging.REJECTED})"
    )


def _first_rejected(directory: str | Path) -> dict[str, str]:
    """Returns where the first record lies that `prepare` rejected for each reason."""
    path = Path(directory, staging.REJECTED)
    found: dict[str, str] = {}
    # By what is counted: what stands in parentheses is of one record.
    for line in writer_lib.read_lines(path) if path.exists() else ():
        found.setdefault(line["reason"].split(" (")[0], _where(line))
    return found


def _where(line: Mapping[str, Any]) -> str:
    """Returns the file of a rejected record, its place there, its images and its id, in words."""
    shown = [line.get("source"), line.get("place"), *line.get("images", ()), f"id {line['id']}"]
    return ", ".join(filter(None, shown))


def _documents(directory: str | Path) -> dict[str, int]:
    """Returns of how many documents the records of each split are; empty for a folder of an earlier
    version."""
    return statistics.counts(directory).get("documents", {})
