import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data import chat, index, shards, tokenizers
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.data.tasks import TASKS
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import towers
from tests.data import templates
from tests.weights.tokenizers import write_chatml


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 255).save(file, "PNG")
    return file.getvalue()


def records() -> list[Record]:
    word = Word("Total", (0, 0, 5, 5))
    turns = (Turn("Why?", ("So.", "Thus.")), Turn("How <end> much?", ("4",)))
    return [
        Record("a", "test", (png(3, 2),), turns, (((word, word),),)),
        Record("b", "test", (), turns),
        Record("c", "test", (png(4, 4), png(1, 9)), (), (((word,),), ())),
    ]


def test_text_tokens_are_the_length_of_the_encoded_chat(tokenizer):
    made = index.of_records(records(), tokenizer, "f")
    for number, record in enumerate(records()):
        for task, turns_of in TASKS.items():
            turns = turns_of(record, np.random.default_rng(5))
            length = len(chat.encode_chat(tokenizer, turns, 0, 0)[0]) if turns else 0
            assert made.text_tokens[task][number] == length
    assert (made.text_tokens["transcribe"] > 0).tolist() == [True, False, True]
    assert (made.text_tokens["answer"] > 0).tolist() == [True, True, False]


def test_image_sizes_belong_to_their_records(tokenizer):
    made = index.of_records(records(), tokenizer, "f")
    assert made.image_starts.tolist() == [0, 1, 1, 3]
    assert made.image_sizes.tolist() == [[2, 3], [4, 4], [9, 1]]


def test_the_hash_is_of_images_and_turns_and_not_of_the_id():
    first, second, _ = records()
    assert index.content_hash(first) == index.content_hash(
        Record("z", "other", first.images, first.turns)
    )
    assert index.content_hash(second) != index.content_hash(
        Record("b", "test", (png(1, 1),), second.turns)
    )
    assert index.content_hash(second) != index.content_hash(
        Record("b", "test", (), second.turns[:1])
    )


def test_shards_are_read_back_one_after_another(tmp_path, tokenizer):
    for shard, part in enumerate((records()[:1], records()[1:])):
        path = tmp_path / shards.shard_name("train", shard, 2)
        shards.write_shard(path, part)
        index.write(index.index_path(path), index.of_records(part, tokenizer, "f"))
    loaded = index.load(tmp_path, "train")
    whole = index.of_records(records(), tokenizer, "f")
    assert len(loaded) == 3 and loaded.tokenizer == "f"
    for task in TASKS:
        assert np.array_equal(loaded.text_tokens[task], whole.text_tokens[task])
    for name in ("image_sizes", "image_starts", "content_hash"):
        assert np.array_equal(getattr(loaded, name), getattr(whole, name))
        assert getattr(loaded, name).dtype == getattr(whole, name).dtype


def test_what_cannot_be_loaded_says_what_to_call(tmp_path, tokenizer):
    with pytest.raises(UserError, match="run `prepare` first"):
        index.load(tmp_path, "train")
    paths = [tmp_path / shards.shard_name("train", shard, 2) for shard in range(2)]
    for path in paths:
        shards.write_shard(path, records())
    again = rf"prepare --recount --out={tmp_path} --tokenizer="
    with pytest.raises(UserError, match=f"is missing.*{again}FOLDER"):
        index.load(tmp_path, "train")
    assert not index.is_counted(tmp_path)
    assert f"--tokenizer={tmp_path}/mine`" in index.recount(tmp_path, tmp_path / "mine")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    assert f"--tokenizer={tmp_path}/own`" in index.recount(tmp_path / "own")
    for fingerprint, path in zip("fg", paths, strict=True):
        index.write(index.index_path(path), index.of_records(records(), tokenizer, fingerprint))
    with pytest.raises(UserError, match=f"several tokenizers.*{again}"):
        index.load(tmp_path, "train")
    whole = index.index_path(paths[0]).read_bytes()
    for broken in (
        b"",
        whole[: len(whole) // 2],
        whole.replace(b"text_tokens.answer.npy", b"text_tokens.answex.npy"),
    ):
        index.index_path(paths[0]).write_bytes(broken)
        with pytest.raises(UserError, match=again):
            index.load(tmp_path, "train")


def test_the_fingerprint_is_of_the_file_that_is_loaded(tmp_path):
    SentencePieceTokenizer.train(tmp_path / "tokenizer.model", ["some text"])
    of_model = index.tokenizer_fingerprint(tmp_path)
    assert of_model == index.tokenizer_fingerprint(tmp_path / "tokenizer.model")
    # As it has ever been where the format follows from the special tokens.
    content = (tmp_path / "tokenizer.model").read_bytes()
    assert of_model == hashlib.blake2b(content, digest_size=8).hexdigest()
    write_chatml(tmp_path)
    assert (
        index.tokenizer_fingerprint(tmp_path)
        == index.tokenizer_fingerprint(tmp_path / "tokenizer.json")
        != of_model
    )
    assert tokenizers.read(tmp_path)[0] == tmp_path / "tokenizer.json"


def test_the_fingerprint_is_of_the_chat_format_as_well(tmp_path):
    """Wherever the same format stands: in a template, or in what `prepare` and `convert` write."""
    qwen = templates.FAMILIES["qwen25"]
    templates.write(tmp_path / "published", qwen)
    templates.write(tmp_path / "other", qwen._replace(template=templates.SMOLLM2))
    published = index.tokenizer_fingerprint(tmp_path / "published")
    assert published != index.tokenizer_fingerprint(tmp_path / "other")
    towers.write(str(tmp_path / "published"), tmp_path / "written")
    assert index.tokenizer_fingerprint(tmp_path / "written") == published
    content = (tmp_path / "published" / "tokenizer.json").read_bytes()
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "tokenizer.json").write_bytes(content)
    (tmp_path / "before" / "prepare.json").write_text("{}")
    before = index.tokenizer_fingerprint(tmp_path / "before")
    assert before == hashlib.blake2b(content, digest_size=8).hexdigest() != published


def test_a_merged_index_is_that_of_the_shards(tmp_path, tokenizer, monkeypatch):
    paths = [tmp_path / shards.shard_name("train", shard, 2) for shard in range(2)]
    for path, part in zip(paths, (records()[:1], records()[1:]), strict=True):
        shards.write_shard(path, part)
        index.write(index.index_path(path), index.of_records(part, tokenizer, "f"))
    apart = index.load(tmp_path, "train")
    assert index.merge(tmp_path, "train") == ["index-train.npz", "shards-train.npz"]
    for path in paths:
        index.index_path(path).unlink()
    merged = index.load(tmp_path, "train")
    assert (
        merged is not apart and merged is index.load(tmp_path, "train") and merged.tokenizer == "f"
    )
    for name in ("image_sizes", "image_starts", "content_hash"):
        assert np.array_equal(getattr(merged, name), getattr(apart, name))
        assert getattr(merged, name).dtype == getattr(apart, name).dtype
    for task in TASKS:
        assert np.array_equal(merged.text_tokens[task], apart.text_tokens[task])
        with pytest.raises(ValueError, match="read-only"):
            merged.text_tokens[task][0] = 1
    shards.write_shard(paths[1], records() * 2000)
    with pytest.raises(
        UserError,
        match=rf"index-train.npz is of other shards; .*prepare --recount --out={tmp_path}",
    ):
        index.load(tmp_path, "train")
