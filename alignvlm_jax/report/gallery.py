"""The answered questions that a report shows with their pages: their choice, the pages, and what
patches of some say."""

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.data import images
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import patch_tokens
from alignvlm_jax.pictures import html, patch_map
from alignvlm_jax.report import contents
from alignvlm_jax.report.contents import Run

QUOTA = {"right": 5, "near": 4, "wrong": 3}
MAX_WIDTH = 800
NUM_LENSES = 3
NUM_READINGS = 6

Place = tuple[str, str]
"""The split of a record, and its id: records of two splits may have one id."""


@dataclasses.dataclass(frozen=True)
class Example:
    """An answered question.

    Attributes:
      split: name of its split.
      verdict: "right", "near" or "wrong".
      row: its line of the predictions file.
    """

    split: str
    verdict: str
    row: Mapping[str, Any]

    @property
    def record_id(self) -> str:
        """The id of the record; that of the question ends in the number of its turn."""
        return self.row["id"].rsplit("/", 1)[0]

    @property
    def place(self) -> Place:
        """Where its record is."""
        return self.split, self.record_id

    def closest_answer(self) -> str:
        """Returns the accepted answer with the least edit distance to the prediction."""
        return min(
            self.row["answers"],
            key=lambda answer: Levenshtein.distance(self.row["prediction"], answer),
        )

    def spelled(self) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
        """Returns the prediction and the closest answer in pieces, each with whether the two agree
        in it."""
        prediction = self.row["prediction"]
        truth = self.closest_answer()
        # White space is alike to the scores: a new line in the place of a space is no error.
        opcodes = Levenshtein.opcodes(*(re.sub(r"\s", " ", text) for text in (prediction, truth)))
        # What is only in one of them has no piece of the other: it is empty, and left out below.
        of_prediction = [
            (prediction[op.src_start : op.src_end], op.tag == "equal") for op in opcodes
        ]
        of_truth = [(truth[op.dest_start : op.dest_end], op.tag == "equal") for op in opcodes]
        return [one for one in of_prediction if one[0]], [one for one in of_truth if one[0]]


def verdict(row: Mapping[str, Any]) -> str:
    """Returns "right" for an exact match, "near" if ANLS is above 0, else "wrong"."""
    if row["exact"]:
        return "right"
    return "near" if row["score"] else "wrong"


def fractions(result: Predictions) -> dict[str, float]:
    """Returns the fraction of predictions with each verdict."""
    verdicts = [verdict(row) for row in result.rows]
    return {name: verdicts.count(name) / len(verdicts) for name in QUOTA}


def choose(results: Mapping[str, Predictions]) -> list[Example]:
    """Returns examples of each verdict, `QUOTA` of them, from all splits in turn.

    The order is that of a hash of their ids, so that no example is picked by hand. If a verdict is
    rarer than its quota, others take its place.
    """
    found: dict[str, list[Example]] = {name: [] for name in QUOTA}
    queues = [_by_hash(split, result) for split, result in results.items()]
    for rank in range(max(map(len, queues), default=0)):
        for queue in queues:
            if rank < len(queue):
                found[queue[rank].verdict].append(queue[rank])
    # The places that rare verdicts leave, which the first verdict with more examples takes.
    room = sum(QUOTA.values()) - sum(min(len(found[name]), quota) for name, quota in QUOTA.items())
    chosen = []
    for name, quota in QUOTA.items():
        take = min(len(found[name]), quota + room)
        room -= max(take - quota, 0)
        chosen += found[name][:take]
    return chosen


def one_of_each(examples: Sequence[Example], count: int) -> list[Example]:
    """Returns `count` examples with as many different verdicts as possible."""
    # The rank of an example is the number of earlier ones with its verdict; sorting by it (the sort
    # is stable) takes the first of each verdict, then the second, and so on.
    ranks = {
        id(one): [other.verdict for other in examples[:i]].count(one.verdict)
        for i, one in enumerate(examples)
    }
    return sorted(examples, key=lambda one: ranks[id(one)])[:count]


def page_uri(record: Record) -> str:
    """Returns the record's first image as a data URI, at most `MAX_WIDTH` pixels wide."""
    page = images.decode_image(record.images[0], record.id)
    # thumbnail keeps the aspect ratio: the height is a bound for receipts only.
    page.thumbnail((MAX_WIDTH, MAX_WIDTH * 4))
    return html.image_uri(page)


def find(run: Run, examples: Sequence[Example]) -> dict[Place, Record]:
    """Returns the records of examples, without those that are no longer where they were.

    They are taken from the very data that the predictions are of: ids of documents that were
    rendered are the same in every folder, and prove nothing by themselves.
    """
    found = {}
    for split in {example.split for example in examples}:
        if (source := _source(run, split)) is None:
            continue
        for example in examples:
            index = example.row["record"]
            if example.split != split or index >= len(source):
                continue
            # A fingerprint is not of the shards: these may have been replaced.
            if (record := source[index]).id == example.record_id:
                found[example.place] = record
    return found


def _source(run: Run, split: str) -> RecordSource | None:
    """Returns the records that the predictions on a split are of; None where they are gone."""
    # The first that has the split: of a folder, some splits alone may have been copied.
    for folder in contents.folders_of(run, run.results[split, False].header):
        with contextlib.suppress(UserError):
            return RecordSource(folder, split)
    return None


def shown(example: Example, record: Record | None) -> dict[str, Any]:
    """Returns what the report shows of an example; without its page if `record` is None."""
    return {
        "split": example.split.replace("_", " "),
        "kind": example.row["kind"],
        "verdict": example.verdict,
        "question": example.row["question"],
        "spelled": example.spelled(),
        "score": example.row["score"],
        "page": record and page_uri(record),
    }


def lenses(
    run: Run, examples: Sequence[Example], records: Mapping[Place, Record]
) -> tuple[list[dict], str]:
    """Returns the patch-token maps of `NUM_LENSES` of the pages shown, and "".

    If there are none, returns an empty list and the reason.
    """
    if run.loaded is None:
        return [], run.problem
    # Only pages that are still there can be encoded.
    chosen = one_of_each([one for one in examples if one.place in records], NUM_LENSES)
    if not examples:
        return [], "There are no answered questions with their pages yet: run `evaluate` first."
    if not chosen:
        return [], "The pages of the answered questions are not there any more."
    try:
        pages = [records[example.place] for example in chosen]
        made = patch_tokens.lenses(
            run.loaded, [images.decode_image(page.images[0], page.id) for page in pages]
        )
    except UserError as err:
        return [], str(err)
    views = [
        {
            "picture": html.png_uri(patch_map.picture(lens)),
            "entropy": float(lens.entropies.mean()),
            "example": shown(example, None),
            "readings": [
                {"image": html.image_uri(one.image), "entropy": one.entropy, "tokens": one.tokens}
                for one in patch_map.readings(lens, NUM_READINGS)
            ],
        }
        for example, lens in zip(chosen, made, strict=True)
    ]
    return views, ""


def _by_hash(split: str, result: Predictions) -> list[Example]:
    """Returns all answered questions of a split in the order of a hash of their ids."""
    rows = sorted(result.rows, key=lambda row: zlib.crc32(row["id"].encode()))
    return [Example(split, verdict(row), row) for row in rows]
