"""Bits per byte against float64 logarithms of the LLM's own probabilities, one window after another
without padding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.benchmarks import predictions, tasks, text_bpb
from alignvlm_jax.data import chat, shards
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.models.decoder import Llama

TASK = tasks.TextTask("held_out", "validation", window=7)
SAID = ("ab a", "", "Total: 12 é\nWho is the tall one? " * 2, "b", "What is it?", "", "ba" * 5)
"""Of records: nothing, less than a window, and several; in bytes of UTF-8 one more than in
characters."""


def record(name: str, text: str) -> Record:
    lines = tuple(
        tuple(Word(word, (0, 0, 1, 1)) for word in line.split(" ")) for line in text.split("\n")
    )
    return Record(name, "pdf", (b"no image",), (), (lines,) if text else ())


def write_split(folder, said=SAID) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [record(f"d{i}", text) for i, text in enumerate(said)]
    shards.write_shard(folder / shards.shard_name("validation", 0, 1), records)


@pytest.fixture(scope="module")
def trained(trained_workdir):
    return loading.load(trained_workdir, loading.load_config(trained_workdir))


@pytest.fixture
def loaded(trained, tmp_path):
    """The model on the 2 x 2 x 2 mesh, in a workdir of its own."""
    path = tmp_path / "run" / "checkpoints" / "7"
    path.mkdir(parents=True)
    return dataclasses.replace(trained, path=path)


@pytest.fixture
def held_out(tmp_path):
    write_split(tmp_path / "held_out")
    return text_bpb.open_text(TASK, tmp_path, None)


def scores(result) -> list[tuple[float, int] | None]:
    return [tuple(row["scores"]["bits_per_byte"]) if row["scores"] else None for row in result.rows]


@pytest.fixture(scope="module")
def expected_bits(trained):
    """begin, text, window -> bits that the LLM alone takes, on one device; each length of a window
    compiles."""
    params = jax.device_get(trained.params)["llm"]
    llm = Llama(trained.config.model.llm, jnp.float32, "none")

    def read(module, seen):
        return module.logits(module(module.embed(seen[None]), jnp.arange(len(seen))[None])[0])[0]

    logits = jax.jit(lambda params, seen: llm.apply({"params": params}, seen, method=read))

    def bits(begin: list[int], text: str, window: int) -> float:
        tokens = np.array([*begin, *trained.tokenizer.encode(text)])
        start = 0
        nats = 0.0
        while start < len(tokens) - 1:
            part = tokens[start : start + window]
            z = np.asarray(logits(params, part[:-1]), np.float64)
            log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
            nats -= log_p[np.arange(len(part) - 1), part[1:]].sum()
            start += len(part) - 1
        return nats / math.log(2)

    return bits


@pytest.mark.parametrize("has_begin", [True, False])
def test_the_value_is_that_of_the_llm_alone(
    loaded, held_out, expected_bits, has_begin, monkeypatch
):
    """Padded, batched over the mesh and cut into windows. Where nothing begins a text, nobody
    predicts its first token: of "b" alone that costs nothing."""
    begin = [loaded.tokenizer.special_tokens["<s>"]] if has_begin else []
    if has_begin:
        assert chat.begin_ids(loaded.tokenizer) == begin
    monkeypatch.setattr(chat, "begin_ids", lambda tokenizer: begin)
    result = text_bpb.Reader(loaded).measure(held_out)
    expected = [expected_bits(begin, text, TASK.window) for text in SAID]
    sizes = [len(text.encode()) for text in SAID]
    for got, text, bits, size in zip(scores(result), SAID, expected, sizes, strict=True):
        assert got == (pytest.approx(bits, rel=1e-6), size) if text else got is None
    assert (expected[3] > 0) == has_begin
    assert [row.get("problem") for row in result.rows if not row["scores"]] == [
        f"record {n} has no text" for n in ("d1", "d5")
    ]
    assert result.statistics().score("bits_per_byte") == pytest.approx(
        sum(expected) / sum(sizes), rel=1e-6
    )
    assert [(row["id"], row["record"], row["kind"]) for row in result.rows][:2] == [
        ("d0", 0, "pdf"),
        ("d1", 1, "pdf"),
    ]


@pytest.mark.parametrize("count", [2, 3, 7, 8, 13, 14, 40])
def test_every_token_but_the_first_is_predicted_once(count):
    parts = text_bpb.windows(np.arange(count), 7)
    assert np.concatenate([part[1:] for part in parts]).tolist() == list(range(1, count))
    assert all(2 <= len(part) <= 7 for part in parts)
    assert all(len(part) == 7 for part in parts[:-1])


def test_a_text_without_anything_to_predict_has_no_window():
    assert text_bpb.windows(np.arange(1), 7) == text_bpb.windows(np.arange(0), 7) == []


def test_the_tower_and_the_connector_do_not_enter(loaded, held_out):
    expected = scores(text_bpb.Reader(loaded).measure(held_out))
    other = {
        **loaded.params,
        "vision": {},
        "connector": jax.tree.map(lambda x: x + np.nan, loaded.params["connector"]),
    }
    without = dataclasses.replace(loaded, params=other, step=8)
    assert scores(text_bpb.Reader(without).measure(held_out)) == expected
    llm = jax.tree.map(lambda x: 0.9 * x, loaded.params["llm"])
    changed = dataclasses.replace(loaded, params={**loaded.params, "llm": llm}, step=9)
    assert scores(text_bpb.Reader(changed).measure(held_out)) != expected


def test_padding_changes_nothing(loaded, held_out):
    """Windows of 40 hold every text but one whole, by much or by little."""
    by_window = {}
    for window in (40, 45):
        task = dataclasses.replace(TASK, window=window)
        by_window[window] = scores(
            text_bpb.Reader(loaded).measure(dataclasses.replace(held_out, task=task))
        )
    pairs = [
        pair for i, pair in enumerate(zip(*by_window.values(), strict=True)) if SAID[i] and i != 2
    ]
    assert len(pairs) == 4
    assert all(one == (pytest.approx(other[0], rel=1e-6), other[1]) for one, other in pairs)
    assert by_window[40][2][0] != pytest.approx(by_window[45][2][0], rel=1e-6)


@pytest.mark.parametrize(("context_length", "window"), [(0, 48), (32, 48), (64, 64), (8192, 512)])
def test_a_window_is_no_longer_than_what_the_model_was_trained_on(
    loaded, held_out, context_length, window
):
    """By its own stage, or by whoever published its weights."""
    config = loaded.config
    llm = dataclasses.replace(config.model.llm, context_length=context_length)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))
    reader = text_bpb.Reader(dataclasses.replace(loaded, config=config))
    longest = reader.measure(
        dataclasses.replace(held_out, task=dataclasses.replace(TASK, window=512))
    )
    assert config.data.seq_len == 48 and longest.header["window"] == window


class Spy:
    """Sees which texts a reader takes up, and what it asks the model; stops before the batch
    numbered `stop_at`."""

    def __init__(self, reader: text_bpb.Reader, stop_at: int = -1):
        self.reader = reader
        self.taken = []
        self.batches = []
        take = reader._windows
        ask = reader._nll

        def windows(asked, window):
            self.taken += [text.id for text in asked]
            return take(asked, window)

        def nll(variables, batch):
            if len(self.batches) == stop_at:
                raise KeyboardInterrupt
            self.batches.append(batch["tokens"])
            return ask(variables, batch)

        reader._windows = windows
        reader._nll = nll


def test_a_stopped_reading_goes_on_and_a_finished_one_is_kept(loaded, held_out, monkeypatch):
    monkeypatch.setattr(
        text_bpb, "BATCH_TOKENS", TASK.window
    )  # four windows: one on each device that rows are spread over
    whole = text_bpb.Reader(loaded).measure(held_out)
    path = predictions.task_path(loading.workdir_of(loaded.path), "held_out")
    assert predictions.read(path) == whole
    path.unlink()

    with pytest.raises(KeyboardInterrupt):
        Spy(text_bpb.Reader(loaded), stop_at=4).reader.measure(held_out)
    kept = predictions.read(path.with_name(path.name + ".partial")).rows
    assert 2 < len(kept) < len(SAID) and not path.exists()
    spy = Spy(text_bpb.Reader(loaded))
    goes_on = spy.reader.measure(held_out)
    assert spy.taken == [f"d{i}" for i in range(len(kept), len(SAID))]
    # Other rows share their batches now.
    assert [row["id"] for row in goes_on.rows] == [row["id"] for row in whole.rows]
    for got, row in zip(goes_on.rows, whole.rows, strict=True):
        for ours, theirs in zip(got["scores"].values(), row["scores"].values(), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)

    spy = Spy(text_bpb.Reader(loaded))
    assert spy.reader.measure(held_out) == goes_on
    assert spy.taken == spy.batches == []


@pytest.mark.parametrize("change", ["step", "tokenizer", "window", "texts"])
def test_anything_else_is_read_anew(loaded, held_out, tmp_path, change):
    before = text_bpb.Reader(loaded).measure(held_out)
    if change == "step":
        loaded = dataclasses.replace(loaded, step=8)
    elif change == "tokenizer":
        other = SentencePieceTokenizer.train(tmp_path / "other.model", ["é", "What is the total?"])
        loaded = dataclasses.replace(loaded, tokenizer=other)
    elif change == "window":
        held_out = dataclasses.replace(held_out, task=dataclasses.replace(TASK, window=8))
    else:
        held_out = dataclasses.replace(held_out, texts=held_out.texts[:-1])
    spy = Spy(text_bpb.Reader(loaded))
    after = spy.reader.measure(held_out)
    assert spy.taken == [text.id for text in held_out.texts]
    assert after.header != before.header
    assert (
        predictions.read(predictions.task_path(loading.workdir_of(loaded.path), "held_out"))
        == after
    )


def test_batches_have_one_shape_and_are_shared_by_the_devices(loaded, held_out, monkeypatch):
    monkeypatch.setattr(text_bpb, "BATCH_TOKENS", 2 * TASK.window)
    spy = Spy(text_bpb.Reader(loaded))
    spy.reader.measure(held_out)
    assert len(spy.batches) > 2
    # Seven texts do not fill two rows on each of four devices: as many rows as texts, or a few
    # more.
    assert {batch.shape for batch in spy.batches} == {(8, TASK.window)}
    assert {batch.sharding.shard_shape(batch.shape) for batch in spy.batches} == {(2, TASK.window)}


def test_what_a_record_says():
    assert text_bpb.text_of(record("d", "ab cd\nef")) == "ab cd\nef"
    turns = (Turn("Who?", ("Ann", "Anna")), Turn("", ("It rains.",)), Turn("And?", ()))
    assert text_bpb.text_of(Record("d", "llava", (), turns)) == "Who?\nAnn\nIt rains.\nAnd?"
    assert text_bpb.text_of(Record("d", "llava", (b"png",), turns)) == ""
    assert text_bpb.text_of(Record("d", "llava", (), (Turn(" ", (" \n",)),))) == ""


def test_records_are_spread_over_the_split_and_bad_folders_are_named(tmp_path):
    write_split(tmp_path / "held_out")
    assert [text.record for text in text_bpb.open_text(TASK, tmp_path, 3).texts] == [0, 2, 4]
    assert len(text_bpb.open_text(TASK, tmp_path, 100).texts) == len(SAID)
    with pytest.raises(UserError, match=r"no shards of split 'test' in .*held_out"):
        text_bpb.open_text(dataclasses.replace(TASK, split="test"), tmp_path, None)
    write_split(tmp_path / "none", ["", ""])
    with pytest.raises(
        UserError, match=r"split 'validation' in .*none: none of 2 records has text"
    ) as error:
        text_bpb.open_text(dataclasses.replace(TASK, folder="none"), tmp_path, None)
    assert "\n" not in str(error.value)
