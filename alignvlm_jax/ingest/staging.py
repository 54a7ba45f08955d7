"""Staging of the folder that `prepare` writes, and its list of what was rejected.

Files in work lie in a folder `.partial-HASH` within it, and move into place when all are complete.
"""

import collections
import json
import os
import shutil
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from alignvlm_jax import storage
from alignvlm_jax.data import index, tokenizers
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import exclude
from alignvlm_jax.ingest.formats import files

REJECTED = "rejected.jsonl"
COUNTS = "counts.json"
"""Numbers of records: those rejected by reason, all of them, and those that share their images."""
IMAGES = "images.jsonl"
"""Local images that records name, with their `files.version` when they were read."""
OTHER_SPLITS = "others"
"""Field of a description: those of the jobs that wrote the folder's other splits, by split."""
MAKERS = ".makers.json"
"""The descriptions of all splits of before, in a staging folder whose files move into place."""
WITHOUT_SPLIT = ("train", "validation")
"""The splits of a job whose description names none."""
NO_FLAGS = ("listing", "version", "perceptual_hash")
"""What of a description follows from the source and the code, not from flags."""
DRAWN = ("rows.html", "records.html")
"""Pages that `inspect` draws of a folder, into it."""
PARTIAL = ".partial-"
OURS = (".array_record", "prepare.json")
"""Ends of names of which a folder that `prepare` wrote has some."""
MAX_SHOWN = 3
MAX_LISTED = 1000
"""Rejected records of one reason that are listed by name; all are counted."""
MAX_REASONS = 100
"""Different reasons that are listed and counted each by itself."""
OTHERS = "other reasons"


class Rejects:
    """A list of rejected records that is short however many there are.

    Attributes:
      counts: how many were rejected, by reason without what is of one record; beyond
        `MAX_REASONS` they are `OTHERS`.
      listed: of the first `MAX_LISTED` of each reason, that reason and what was given.
    """

    def __init__(self, expected: Iterable[str] = ()):
        """`expected` reasons are counted by themselves, whatever others come first."""
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(expected, 0))
        self.listed: list[tuple[str, Any]] = []

    def add(self, reason: str, value: Any) -> None:
        """Counts a rejected record, and lists `value` of it."""
        head = self._head(reason)
        self.counts[head] += 1
        if self.counts[head] <= MAX_LISTED:
            self.listed.append((head, value))

    def add_unlisted(self, reason: str, count: int) -> None:
        """Counts further records, of which no more is known."""
        if count:
            self.counts[self._head(reason)] += count

    def room(self, reason: str) -> int:
        """Returns how many other records of a reason would be listed."""
        return max(MAX_LISTED - self.counts[self._head(reason)], 0)

    def _head(self, reason: str) -> str:
        # What stands in parentheses is of one record.
        head = reason.split(" (")[0]
        return head if head in self.counts or len(self.counts) < MAX_REASONS else OTHERS


def is_ready(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder `out` holds the complete data that `wanted` describes, of images that are
    still as they were."""
    found = description(out)
    # Known only after all was read, so that no job can want it.
    checksum = found.pop("images_read", None)
    found.pop(OTHER_SPLITS, None)
    try:
        return found == wanted and (checksum is None or not is_changed(out / IMAGES))
    except (OSError, ValueError):
        return False


def description(out: Path) -> dict[str, Any]:
    """Returns the description of the complete data in a folder; empty where there is none that can
    be read."""
    try:
        found = json.loads((out / "prepare.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_flags(out: Path, wanted: dict[str, Any], splits: Iterable[str]) -> None:
    """Checks that `splits` of a folder were not prepared with other flags.

    A source that has grown, and data of an earlier version, are prepared anew without a question:
    no document changes sides by it.

    Raises:
      UserError: other flags made what `out` holds; the message names them, and what to do.
    """
    makers = _makers(out)
    # What a job has begun to move into place, it may finish.
    if not makers or (_staging(out, wanted) / MAKERS).exists():
        return
    held = [split for split in splits if shards_lib.shard_paths(out, split)]
    for split in held:
        known = makers.get(split, {})
        changed = _changed(known, wanted)
        if known and not changed:
            continue
        sizes = _sizes(out, (one for one in held if makers.get(one, {}) == known))
        before, now = (" ".join(_flag(of, name) for name in changed) for of in (known, wanted))
        fault = f"holds {sizes} records of a job whose flags are not kept: this command"
        if known:
            fault = f"was prepared with {before} ({sizes} records), and this command has {now}: it"
        hint = "`prepare --recount` counts the tokens of another tokenizer, and moves no record"
        raise UserError(
            f"{out} {fault} would write all anew, and what was trained on may become what is held "
            "out; give another --out, or --overwrite" + f"; {hint}" * (changed == ["tokenizer"])
        )


def _changed(known: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns the fields in which two descriptions differ by their flags."""
    return [
        name
        for name in wanted
        if name in known and name not in NO_FLAGS and _flag(known, name) != _flag(wanted, name)
    ]


def check_tokenizer(out: Path, splits: Collection[str], tokenizer: str | Path) -> None:
    """Checks that a job of `splits` leaves the others of a folder the tokenizer they have.

    Raises:
      UserError: there are others, and this is another one.
    """
    others = _others(out, splits)
    if not others or not any((out / name).exists() for name in tokenizers.NAMES):
        return
    before, now = map(index.tokenizer_fingerprint, (out, tokenizer))
    if before != now:
        raise UserError(
            f"{out} holds {_sizes(out, others)} records with a tokenizer of fingerprint "
            f"{before:.8}, and this command would put another in its place, {now:.8}; take "
            f"that of {out}, another --out, or --overwrite"
        )


def check_out(out: Path, **read: str) -> None:
    """Checks that `out` is none of the folders that a job reads, given by their flags: it would
    write over its own source.

    Raises:
      UserError: it is one of them, under this name or another.
    """
    for flag, folder in read.items():
        # Not Path.resolve, which a link to itself ends.
        if Path(folder).is_dir() and os.path.realpath(out) == os.path.realpath(folder):
            raise UserError(
                f"--out={out} is --{flag} itself, all of which is read; name another folder, "
                "beside it or within"
            )


def _makers(out: Path) -> dict[str, dict[str, Any]]:
    """Returns the descriptions of the jobs that wrote the splits of a folder, by split, as far as
    they are known."""
    found = description(out)
    if not found:
        # An interrupted `publish` has taken it away.
        kept = next(out.glob(f"{PARTIAL}*/{MAKERS}"), None)
        return json.loads(kept.read_text()) if kept else {}
    others = found.pop(OTHER_SPLITS, {})
    names = shards_lib.split_names(path.name for path in out.glob("*"))
    if "split" in found:
        # Folders of before say of the last job alone what it was: of others nothing is known.
        names = [found["split"]] if found["split"] else WITHOUT_SPLIT
    return dict.fromkeys(names, found) | others


def _others(out: Path, splits: Collection[str]) -> list[str]:
    """Returns the splits of a folder that are none of `splits`."""
    names = shards_lib.split_names(path.name for path in out.glob("*"))
    return [split for split in names if split not in splits]


def _sizes(out: Path, splits: Iterable[str]) -> str:
    return ", ".join(f"{split} {len(shards_lib.RecordSource(out, split)):,}" for split in splits)


def _flag(description: dict[str, Any], name: str) -> str:
    """Returns a field of a description as a flag of `prepare`."""
    value = description[name]
    if name == "exclude":
        value = ",".join(folder for folder, _ in value)
    if name == "tokenizer":
        # Of which the description holds no path: the same file may lie elsewhere by now.
        value = f"... (fingerprint {value:.8})"
    if name == "group_tokens" and not value:
        return "--no-group_by_image"
    if name == "split" and not value:
        return "no --split"
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name}"
    return f"--{name}={value}"


def is_changed(listed: Path) -> bool:
    """Whether an image of a file of [path, version] lines was written anew, came or went since;
    raises OSError where there is no such file."""
    # A million images take some seconds.
    with open(listed) as lines:
        return any(files.version(path) != version for path, version in map(json.loads, lines))


def join_images(parts: Iterable[Path], folder: Path) -> list[str]:
    """Writes the list of the images that records name out of those of all parts, of which some have
    none; returns its name, and none where there are no such images."""
    found = [path for path in parts if path.exists()]
    if not found:
        return []
    # As bytes, a part at a time: of a million images the list has 100 MB.
    with open(folder / IMAGES, "wb") as file:
        for path in found:
            file.write(path.read_bytes())
    return [IMAGES]


def partial_folder(out: Path, wanted: dict[str, Any]) -> Path:
    """Returns the staging folder of the data that `wanted` describes; creates it if need be.

    It is the same for every run of the same job, so that an interrupted one resumes.

    Raises:
      UserError: `out` is a file, or holds files that are none of `prepare`.
    """
    _check_is_ours(out)
    folder = _staging(out, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _staging(out: Path, wanted: dict[str, Any]) -> Path:
    # Within `out`, not in a temporary folder: os.replace works only on one file system.
    return out / f"{PARTIAL}{zlib.crc32(json.dumps(wanted, sort_keys=True).encode()):08x}"


def _check_is_ours(out: Path) -> None:
    """Raises UserError unless a folder can be written to: one that is new, empty, or that `prepare`
    wrote. Among other files shards would be lost, and those among them."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; take a folder, or a new name")
    # One name that only `prepare` writes will do: a folder of ours in which somebody has left notes
    # is still ours.
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    # Not what desktops leave in every folder, as .DS_Store.
    found = [name for name in names if name.startswith(PARTIAL) or not name.startswith(".")]
    if found and not any(name.endswith(OURS) or name.startswith(PARTIAL) for name in found):
        shown = ", ".join(found[:MAX_SHOWN]) + (", ..." if found[MAX_SHOWN:] else "")
        raise UserError(f"--out={out} holds other files ({shown}); take a new folder")


def publish(
    out: Path, ready: Path, names: Collection[str], splits: Collection[str], wanted: dict[str, Any]
) -> None:
    """Moves the finished files into `out`, in the place of what was prepared there before.

    The call may be interrupted and repeated. Shards of splits that are not in `splits` belong to
    another job, and stay.

    Args:
      out: the folder of the data set.
      ready: the staging folder.
      names: names of the files to move; those not in `ready` any more have moved already.
      splits: the splits that are replaced.
      wanted: the content of `prepare.json`, which is written last and says that the data is
        complete.
    """
    names = {*names} - {MAKERS}
    stay = _others(out, splits)
    # A repeated call finds no prepare.json any more.
    if not (ready / MAKERS).exists():
        write_json(ready / MAKERS, _makers(out))
    makers = json.loads((ready / MAKERS).read_text())
    # First of all: from here on the folder is neither the old data nor the new.
    (out / "prepare.json").unlink(missing_ok=True)
    shards = [path for split in splits for path in shards_lib.shard_paths(out, split)]
    others = [out / name for name in (REJECTED, COUNTS, IMAGES)]
    # Of a job without one, as of a reader's lines, the tokenizer stays with the splits that do.
    if not stay or names & {*tokenizers.NAMES}:
        others += [out / name for name in (*tokenizers.NAMES, tokenizers.CHAT_FORMAT)]
    others += [
        out / name
        for split in splits
        for name in (
            index.merged_name(split),
            shards_lib.table_name(split),
            exclude.file_name(split),
        )
    ]
    # Old shards have to go: with other numbers (`-of-00007`) they would lie beside the new ones.
    # A name that is in `names` may be a new file that a repeated call finds in place.
    for old in (*shards, *map(index.index_path, shards), *others):
        if old.name not in names:
            old.unlink(missing_ok=True)
    for name in names:
        if (ready / name).exists():
            os.replace(ready / name, out / name)
    # With it, data of other images have another fingerprint.
    if IMAGES in names:
        wanted = wanted | {"images_read": f"{zlib.crc32((out / IMAGES).read_bytes()):08x}"}
    # The flags of each split are kept, so that none is written anew by others.
    if stay:
        wanted = wanted | {OTHER_SPLITS: {split: makers.get(split, {}) for split in stay}}
    write_json(out / "prepare.json", wanted)
    # Last: a staging folder that is deleted halfway could not be resumed.
    for leftover in out.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)


def drop_drawn(out: Path) -> str:
    """Deletes the pages that `inspect` drew of what a folder held before, and returns a line that
    says so; "" where there are none."""
    # Pages that were written elsewhere by --out are the user's.
    old = [name for name in DRAWN if (out / name).exists()]
    for name in old:
        (out / name).unlink()
    if not old:
        return ""
    return f"{' and '.join(old)} showed what {out} held before: deleted; `inspect` draws anew"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step: a reader never sees a part of it."""
    storage.write_whole(path, json.dumps(value, indent=2) + "\n")
