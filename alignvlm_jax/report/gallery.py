"""The choice of the answered questions that a report shows with their pages."""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.data import images
from alignvlm_jax.data.record import Record
from alignvlm_jax.pictures.html import image_uri

QUOTA = {"right": 5, "near": 4, "wrong": 3}
MAX_WIDTH = 800


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
    return image_uri(page)


def _by_hash(split: str, result: Predictions) -> list[Example]:
    """Returns all answered questions of a split in the order of a hash of their ids."""
    rows = sorted(result.rows, key=lambda row: zlib.crc32(row["id"].encode()))
    return [Example(split, verdict(row), row) for row in rows]
