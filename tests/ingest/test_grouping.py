"""Questions about one image in one record, and copies: whatever parts they lie in."""

import itertools
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from alignvlm_jax.commands import prepare as command
from alignvlm_jax.data import index
from alignvlm_jax.ingest import finish, staging, statistics, summary, writer
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.jsonl import Jsonl

PAGES = 12
QUESTIONS = 5


def words(text):
    return [[[{"text": text, "box": [0, 0, 2, 1]}]]]


@pytest.fixture
def source(tmp_path, png, monkeypatch):
    """Pages with five questions each, which stand far apart, in pieces of about seven; the fourth
    record of each page has its words."""
    monkeypatch.setattr(files, "UNIT_RECORDS", 7)
    objects = []
    for question, page in itertools.product(range(QUESTIONS), range(PAGES)):
        (tmp_path / f"{page}.png").write_bytes(png(shade=page))
        turn = {"question": f"What is {question} of {page}?", "answers": [f"{page}.{question}"]}
        objects.append({"id": f"p{page}q{question}", "images": [f"{page}.png"], "turns": [turn]})
        if question == 3:
            objects[-1]["lines"] = words(f"w{page}")
    return write(tmp_path, objects)


def write(folder, objects):
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects))
    return folder / "data.jsonl"


def test_questions_about_a_page_share_its_record(source, prepare, tokenizer):
    prepared = prepare(Jsonl(), source, group_tokens=1000)
    records = prepared.records()
    # The first of each page, in the order of the source.
    assert [record.id for record in records] == [f"p{page}q0" for page in range(PAGES)]
    for page, record in enumerate(records):
        assert len(record.images) == 1 and record.lines[0][0][0].text == f"w{page}"
        expected = [(f"What is {q} of {page}?", (f"{page}.{q}",)) for q in range(QUESTIONS)]
        assert [(turn.question, turn.answers) for turn in record.turns] == expected
        assert [turn.id for turn in record.turns] == [f"p{page}q{q}" for q in range(QUESTIONS)]
    assert not prepared.rejected()
    assert statistics.joined(prepared.folder) == (PAGES * (QUESTIONS - 1), PAGES)
    assert "60 records about the same images share 12 records, their" in summary.of(prepared.folder)
    assert_index_is_of_its_records(prepared, "train", tokenizer)
    # Without the option each stays by itself.
    apart = prepare(Jsonl(), source, "apart")
    assert len(apart.records()) == PAGES * QUESTIONS and not apart.records()[0].turns[0].id


def test_the_bytes_are_the_same_for_any_workers_and_order_of_parts(source, prepare, tokenizer):
    alone = prepare(Jsonl(), source, "alone", group_tokens=30, holdout=0.3)
    two = prepare(Jsonl(), source, "two", group_tokens=30, holdout=0.3, num_workers=2)
    assert two.files() == alone.files()
    assert alone.records("validation") and len(alone.records()) < PAGES * QUESTIONS


def assert_index_is_of_its_records(prepared, split, tokenizer):
    known = index.load(prepared.folder, split)
    made = index.of_records(prepared.records(split), tokenizer, "")
    for task, lengths in made.text_tokens.items():
        assert np.array_equal(known.text_tokens[task], lengths)
    for name in ("content_hash", "image_sizes", "image_starts"):
        assert np.array_equal(getattr(known, name), getattr(made, name))


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("holdout", [0.0001, 0.9999])
def test_a_document_that_moves_leaves_both_indexes_right(
    tmp_path, prepare, tokenizer, png, monkeypatch, place, holdout
):
    monkeypatch.setattr(files, "UNIT_RECORDS", 9)
    # By the hashes that decide; the first is the one that moves.
    pages = sorted(range(5), key=lambda page: writer.document_hash(f"d{page}"))
    pages = pages if holdout < 0.5 else pages[::-1]
    moved = pages.pop(0)
    pages.insert(place, moved)
    objects = []
    for page in pages:
        (tmp_path / f"{page}.png").write_bytes(png(20 + page, 30, shade=page))
        for number in range(3):
            turn = {"question": f"{'Why' * (page + number)} {page}?", "answers": [f"{number}" * 9]}
            one = {"id": f"p{page}q{number}", "images": [f"{page}.png"], "turns": [turn]}
            objects.append(one | {"document": f"d{page}"})
    prepared = prepare(Jsonl(), write(tmp_path, objects), group_tokens=1000, holdout=holdout)
    target = "validation" if holdout < 0.5 else "train"
    assert {record.id[:2] for record in prepared.records(target)} == {f"p{moved}"}
    for split in ("train", "validation"):
        assert_index_is_of_its_records(prepared, split, tokenizer)
    assert sum(len(record.turns) for record in prepared.records("train")) in (3, 12)


@pytest.mark.parametrize("count", range(1, 22, 4))
def test_an_interrupted_join_goes_on(source, prepare, monkeypatch, count):
    whole = prepare(Jsonl(), source, "whole", group_tokens=30)
    calls = itertools.count(1)
    original = finish.ShardWriter.write

    def stop(*args):
        if next(calls) == PAGES * QUESTIONS + count:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finish.ShardWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(Jsonl(), source, group_tokens=30)
    assert prepare(Jsonl(), source, group_tokens=30).files() == whole.files()


def test_a_killed_command_goes_on_with_the_same_bytes(source, tokenizer, tmp_path):
    # A part a file, since a process of its own knows nothing of smaller pieces.
    lines = source.read_text().splitlines(True)
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_text("".join(lines[10 * number : 10 * number + 10]))
    source.unlink()
    flags = [
        *(sys.executable, "-m", "alignvlm_jax", "prepare", "--format=jsonl", "--num_workers=1"),
        *(f"--source={tmp_path}", f"--tokenizer={tokenizer.name}", "--shard_records=10"),
        "--holdout=0",
    ]
    begin = time.monotonic()
    subprocess.run([*flags, f"--out={tmp_path}/whole"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begin
    for fraction in (0.6, 0.8, 0.9, 0.95):
        running = subprocess.Popen([*flags, f"--out={tmp_path}/out"], stdout=subprocess.DEVNULL)
        try:
            running.wait(fraction * seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
    subprocess.run([*flags, f"--out={tmp_path}/out"], check=True, stdout=subprocess.DEVNULL)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "out")
    )
    assert one == other and len([name for name in one if name.startswith("train-")]) == 2
    assert len(index.load(tmp_path / "whole", "train")) == PAGES


def test_the_cap_opens_another_record(source, prepare, tokenizer):
    tokens = index.load(prepare(Jsonl(), source, "a").folder, "train").text_tokens["answer"]
    cap = int(tokens[:PAGES].max()) * 2
    records = prepare(Jsonl(), source, group_tokens=cap).records()
    assert {len(record.turns) for record in records} <= {1, 2} and len(records) < 60
    assert sum(len(record.turns) for record in records) == PAGES * QUESTIONS
    # The cap holds for what shares; a question that is longer by itself stays.
    assert len(prepare(Jsonl(), source, "one", group_tokens=1).records()) == PAGES * QUESTIONS


def test_other_words_of_an_image_stay_apart(tmp_path, prepare, png):
    (tmp_path / "1.png").write_bytes(png())
    objects = [{"id": name, "images": ["1.png"], "lines": words(name)} for name in "aab"]
    for number, one in enumerate(objects):
        one["id"] += str(number)
        one["turns"] = [{"question": f"{number}?", "answers": ["x"]}]
    records = prepare(Jsonl(), write(tmp_path, objects), group_tokens=100).records()
    assert [[turn.id for turn in record.turns] for record in records] == [["a0", "a1"], [""]]


def test_images_in_another_order_or_of_another_number_are_other_groups(tmp_path, prepare, png):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(shade=ord(name)))
    shown = ["ab", "ba", "a", "ab", "aa", ""]
    objects = [
        {
            "images": [f"{name}.png" for name in names],
            "turns": [{"question": f"{number}?", "answers": ["x"]}],
        }
        for number, names in enumerate(shown)
    ]
    records = prepare(Jsonl(), write(tmp_path, objects), group_tokens=1000).records()
    assert [len(record.turns) for record in records] == [2, 1, 1, 1, 1]


def test_a_split_for_evaluation_keeps_a_record_a_question_and_its_copies(
    source, prepare, tokenizer, tmp_path
):
    with open(source, "a") as file:
        file.write(source.read_text().splitlines()[0].replace("p0q0", "again") + "\n")
    flags = ["--format=jsonl", f"--source={source}", f"--tokenizer={tokenizer.name}"]
    command.main([*flags, "--split=test", f"--out={tmp_path}/test"])
    assert len(index.load(tmp_path / "test", "test")) == PAGES * QUESTIONS + 1
    command.main([*flags, "--holdout=0.3", f"--out={tmp_path}/train"])
    known = {split: index.load(tmp_path / "train", split) for split in writer.SPLITS}
    held = len(known["validation"])
    assert held and held % QUESTIONS == 0 and len(known["train"]) == PAGES - held // QUESTIONS
    command.main([*flags, "--no-group_by_image", f"--out={tmp_path}/apart", "--holdout=0"])
    assert len(index.load(tmp_path / "apart", "train")) == PAGES * QUESTIONS + 1
    [line] = (tmp_path / "train/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].endswith(
        f"are those of another record (p0q0 in {source}, line 1)"
    )
    assert json.loads(line)["id"] == "again"


def test_copies_in_other_parts_are_told_and_counted(source, prepare):
    lines = source.read_text().splitlines()
    copies = [line.replace('"id": "p', '"id": "copy of p') for line in lines[: 3 * PAGES]]
    source.write_text("\n".join([*lines, *copies]) + "\n")
    prepared = prepare(Jsonl(), source, group_tokens=1000)
    assert len(prepared.records()) == PAGES
    assert sum(len(record.turns) for record in prepared.records()) == PAGES * QUESTIONS
    reasons = prepared.reasons()
    assert len(reasons) == 3 * PAGES
    assert reasons["copy of p3q1"].endswith(f"(p3q1 in {source}, line 16)")


def test_a_flood_of_rejects_is_counted_and_not_listed(tmp_path, prepare, png, monkeypatch):
    monkeypatch.setattr(staging, "MAX_LISTED", 20)
    monkeypatch.setattr(staging, "MAX_REASONS", 6)
    monkeypatch.setattr(files, "UNIT_RECORDS", 50)
    (tmp_path / "1.png").write_bytes(png())
    good = {"images": ["1.png"], "turns": [{"question": "q", "answers": ["a"]}]}
    floods = [{"images": ["none.png"]} for _ in range(300)]
    odd = [{f"key{number}": 1} for number in range(40)]
    objects = [good, *floods, *odd, *[good | {"id": "x"}] * 200]
    prepared = prepare(Jsonl(), write(tmp_path, objects), group_tokens=100)
    assert len(prepared.records()) == 1
    counted = statistics.rejected(prepared.folder)
    assert sum(counted.values()) == 540 and counted["an image is missing"] == 300
    assert counted["duplicate id"] == 199 and len(counted) <= 7
    assert len(prepared.rejected()) <= 7 * 20
    assert "rejected: 540" in summary.of(prepared.folder)
