"""Images of a benchmark in what trains: found by their bytes and by what they show, and no others."""

import io
import json
import random
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from alignvlm_jax.commands import prepare as command
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.shards import write_shard
from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.ingest import exclude
from alignvlm_jax.ingest.formats.jsonl import Jsonl


def page(number: int) -> Image.Image:
    """A page of lines of words."""
    rng = random.Random(number)
    image = Image.new("L", (420, 594), 255)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(rng.choice([9, 10, 12]))
    at = 40
    while at < 540:
        words = ["x" * rng.randrange(1, 9) for _ in range(rng.randrange(2, 12))]
        draw.text((45, at), " ".join(words), fill=0, font=font)
        at += 13 + 12 * (rng.random() < 0.1)
    return image


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def changed(image: Image.Image) -> dict[str, bytes]:
    (width, height) = image.size
    edge = (width // 100, height // 100, width - width // 100, height - height // 100)
    return {
        "jpeg": encoded(image, "JPEG", quality=50),
        "half": encoded(image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)),
        "crop": encoded(image.crop(edge)),
        "colour": encoded(image.convert("RGB")),
    }


def distance(one: bytes, other: bytes) -> int:
    numbers = [np.array(exclude.perceptual_hash(image, ""), np.uint64) for image in (one, other)]
    return int(np.bitwise_count(numbers[0] ^ numbers[1]).sum())


def test_pages_of_text_look_different_and_their_copies_alike():
    pages = [page(number) for number in range(60)]
    perceptual = np.array([exclude.perceptual_hash(encoded(one), "") for one in pages], np.uint64)
    bits = np.bitwise_count(perceptual[:, None] ^ perceptual).sum(axis=-1)
    assert bits[np.triu_indices(len(pages), 1)].min() > exclude.MAX_DISTANCE + 10
    for one in pages[:12]:
        for other in changed(one).values():
            assert distance(encoded(one), other) <= exclude.MAX_DISTANCE


def test_a_blank_page_has_no_look_and_a_dark_one_has():
    blank = Image.new("L", (100, 100), 250)
    assert exclude.perceptual_hash(encoded(blank), "") == [0] * 4
    dark = page(1).point(lambda level: 255 - level)
    assert distance(encoded(dark), encoded(dark, "JPEG", quality=50)) <= exclude.MAX_DISTANCE


def write(folder, images: dict[str, bytes]):
    folder.mkdir(exist_ok=True)
    lines = []
    for name, data in images.items():
        (folder / f"{name}.png").write_bytes(data)
        turns = [{"question": "Who?", "answers": [name]}]
        lines.append(json.dumps({"id": name, "images": [f"{name}.png"], "turns": turns}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def sources(tmp_path):
    """A benchmark of ten pages, and training pages: ten others, and copies of three of those."""
    test = {f"t{number}": encoded(page(number)) for number in range(10)}
    blank = encoded(Image.new("L", (50, 50), 255))
    train = {f"n{number}": encoded(page(100 + number)) for number in range(10)}
    copies = {f"{kind}{n}": data for n in range(3) for kind, data in changed(page(n)).items()}
    write(tmp_path / "test", test | {"blank": blank})
    small = encoded(Image.new("L", (60, 60), 255))
    write(tmp_path / "train", train | copies | {"same": test["t5"], "blank page": small})
    return tmp_path


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_benchmark_shows_is_not_trained_on(sources, tokenizer, capsys, monkeypatch, kept):
    flags = ["--format=jsonl", f"--tokenizer={tokenizer.name}", "--num_workers=1"]
    test = sources / "prepared"
    command.main([*flags, f"--source={sources}/test", f"--out={test}", "--split=test"])
    if kept:
        monkeypatch.setattr(exclude.shards_lib, "RecordSource", lambda *_: pytest.fail("decoded"))
    else:
        (test / "images-test.npz").unlink()
    out = sources / "out"
    train = [*flags, f"--source={sources}/train", f"--out={out}", "--holdout=0"]
    command.main([*train, f"--exclude={test}:test"])
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert reasons.pop("same").startswith(
        f"its image is an excluded one (t5 in {test}, byte for byte"
    )
    assert {*reasons} == {f"{kind}{n}" for n in range(3) for kind in changed(page(0))}
    assert all(f"(t{name[-1]} in {test}, all but" in reason for name, reason in reasons.items())
    printed = capsys.readouterr().out
    assert "train: 11 records" in printed and "12: its image looks like an excluded" in printed
    told = "--exclude dropped 1 record by the bytes of an image, and 12 records by its look, as"
    [head, *pairs] = printed.partition(told)[2].splitlines()[: 1 + exclude.MAX_PAIRS]
    assert head.endswith("all are in rejected.jsonl:")
    for line in pairs:
        assert re.fullmatch(
            rf"  (\w+?)(\d) \({sources}/train/data\.jsonl\): t\2 in {test}, all but \d+ of 256 bits",
            line,
        )
    # Of the same benchmark nothing is new, of another one all is.
    command.main([*train, f"--exclude={test}:test"])
    assert "is ready" in capsys.readouterr().out


def test_a_wrong_folder_or_split_is_told_before_anything_is_written(sources, tokenizer, prepare):
    test = prepare(Jsonl(), sources / "test", "other").folder
    with pytest.raises(UserError, match=r"--exclude=.*/nowhere has no shards; name a folder"):
        prepare(Jsonl(), sources / "train", exclude=(f"{sources}/nowhere",))
    with pytest.raises(
        UserError, match=r":trian has no shards of that split; did you mean 'train'"
    ):
        prepare(Jsonl(), sources / "train", exclude=(f"{test}:trian",))
    flags = ["--format=jsonl", f"--source={sources}/train", f"--out={sources}/o", "--split=test"]
    with pytest.raises(UsageError, match="--split=test is for evaluation"):
        command.main([*flags, f"--tokenizer={tokenizer.name}", f"--exclude={test}"])


def test_a_split_may_begin_with_a_digit_and_lie_in_the_folder_that_is_written(
    sources, tokenizer, capsys
):
    assert exclude.folder_of("s3://one/two") == ("s3://one/two", "")
    assert exclude.folder_of("a:b/c:2024_x") == ("a:b/c", "2024_x")
    out = sources / "both"
    flags = ["--format=jsonl", f"--tokenizer={tokenizer.name}", "--num_workers=1", f"--out={out}"]
    command.main([*flags, f"--source={sources}/test", "--split=2024"])
    train = [*flags, f"--source={sources}/train", "--holdout=0", f"--exclude={out}:2024"]
    command.main(train)
    assert "train: 11 records" in capsys.readouterr().out
    command.main(train)
    assert "is ready" in capsys.readouterr().out
    # Another benchmark in its place is told.
    command.main([*flags, f"--source={sources}/train", "--split=2024", "--overwrite"])
    with pytest.raises(UserError, match="n0; 24 rejected"):
        command.main(train)


def test_hashes_of_another_version_are_made_anew(sources, tokenizer, prepare, monkeypatch):
    monkeypatch.setattr(exclude, "VERSION", 0)
    test = prepare(Jsonl(), sources / "test", "benchmark", split="test").folder
    monkeypatch.undo()
    looked_at = []
    original = exclude.perceptual_hash

    def looks(image, name):
        looked_at.append(name)
        return original(image, name)

    monkeypatch.setattr(exclude, "perceptual_hash", looks)
    requested = []
    monkeypatch.setattr(
        exclude.shards_lib.RecordSource,
        "prefetch",
        lambda _, number: requested.append((number, len(looked_at))),
    )
    exclude.gather([f"{test}:test"], sources / "found.npz")
    # Of a few records all are requested before the first is used.
    assert requested == [(number, 0) for number in range(11)]
    assert looked_at[0] == f"of t0 in {test}" and len(looked_at) == 11
    found = exclude.read(str(sources / "found.npz"), (sources / "found.npz").stat().st_size)
    assert found.names[0] == f"t0 in {test}" and len(found.hashes) == 11
    # A file that knows of no version.
    np.savez(sources / "old.npz", **found._asdict())
    assert exclude.read(str(sources / "old.npz"), (sources / "old.npz").stat().st_size) is None


def test_an_image_that_does_not_decode_is_named(tmp_path):
    broken = encoded(page(1))[:-500]
    write_shard(tmp_path / "train-00000-of-00001.array_record", [Record("r7", "x", (broken,), ())])
    with pytest.raises(UserError, match=f"cannot read image of r7 in {tmp_path}: "):
        exclude.gather([str(tmp_path)], tmp_path / "found.npz")
