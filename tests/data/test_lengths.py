import dataclasses
import io
import tempfile

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax import presets
from alignvlm_jax.data import images, labels, lengths
from alignvlm_jax.data import index as index_lib
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError
from tests.data.test_loader import change
from tests.prepared import write_shard

TASKS = ("answer", "transcribe")


def limits(config) -> lengths.Limits:
    return lengths.Limits.of(config.data, config.model.vision, config.tokens_per_tile)


def load(config, size: int) -> lengths.Lengths:
    """The lengths of so many records of the one folder, opened anew."""
    opened = StageData.open(config.data, config.model)
    return lengths.load(opened, config.data.folders, "train", TASKS, [size], limits(config))


def record(*sizes: tuple[int, int], answer: str = "4", words: int = 0) -> Record:
    pages = []
    for width, height in sizes:
        file = io.BytesIO()
        Image.new("L", (width, height)).save(file, "PNG")
        pages.append(file.getvalue())
    line = (Word("ab", (0, 0, 9, 9)),) * words
    turns = (Turn("How much?", (answer,)),) if answer else ()
    return Record("r", "test", tuple(pages), turns, ((line,),) * len(pages) if words else ())


def test_they_are_those_of_the_parts_that_rows_are_made_of(demo_config, tokenizer):
    config = change(
        demo_config, "data", max_tiles=6, seq_len=400, record_tiles=3, use_overview=True
    )
    records = [
        record(),
        record((128, 32)),
        record((128, 64), answer="1234", words=9),
        record((300, 70), (4, 200), words=2),
        record((128, 96), (10, 10), (600, 9)),
    ]
    builder = ExampleBuilder.of(config, tokenizer)
    found = lengths.measure(index_lib.of_records(records, tokenizer, "f"), TASKS, limits(config))
    for number, one in enumerate(records):
        for task, name in enumerate(TASKS):
            if name == "transcribe" and not one.lines:
                assert found.tokens[task, number] == 0
                continue
            part = builder.segment(one, name, np.random.default_rng(0))
            assert found.tokens[task, number] == len(part.tokens)
            assert found.tiles[number] == len(part.tile_arrays["tiles"])


def test_records_of_no_use_and_longer_than_a_row(demo_config, tokenizer):
    records = [record((9, 9), answer=""), record((9, 9), answer="x" * 500), record(*[(9, 9)] * 3)]
    found = lengths.measure(
        index_lib.of_records(records, tokenizer, "f"), TASKS, limits(demo_config)
    )
    assert found.tokens.tolist() == [[0, demo_config.data.seq_len, 0], [0, 0, 0]]


def test_an_index_that_does_not_fit_says_what_to_call(demo_config, tokenizer, tmp_path):
    config = change(demo_config, "data", dir=str(tmp_path), tokenizer=tokenizer.name)
    shard = tmp_path / "train-00000-of-00001.array_record"
    write_shard(shard, [record()] * 3, tokenizer)
    assert load(config, 3).tokens.shape == (2, 3)
    again = f"prepare --recount --out={tmp_path} --tokenizer="
    with pytest.raises(UserError, match=f"has 4 records and an index of 3.*{again}"):
        load(config, 4)
    whole = index_lib.load(tmp_path, "train")
    index_lib.write(index_lib.index_path(shard), dataclasses.replace(whole, tokenizer="other"))
    with pytest.raises(UserError, match=f"counted by another tokenizer.*{again}"):
        load(config, 3)
    index_lib.index_path(shard).unlink()
    with pytest.raises(UserError, match=f"is missing.*{again}"):
        load(config, 3)


def test_shared_lengths_are_not_those_of_another_way_of_measuring(
    demo_config, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(lengths.plan_file, "MIN_RECORDS", 1)
    records = [record((128, 64)), record((300, 70), words=2)]

    def shared() -> lengths.Lengths:
        # Of an index of its own: another process, whose caches hold nothing.
        known = index_lib.of_records(records, tokenizer, "f")
        return lengths._measured((known,), TASKS, limits(demo_config))

    first = shared()
    with monkeypatch.context() as patch:
        patch.setattr(lengths, "_measure_all", lambda *_: pytest.fail("measured again"))
        assert np.array_equal(shared().tokens, first.tokens)
    original = images.count_tiles
    monkeypatch.setattr(images, "count_tiles", lambda *args: original(*args) + 1)
    assert np.array_equal(shared().tiles, first.tiles + 1)


@pytest.mark.parametrize("size", [(1169, 827), (1100, 850), (827, 1169), (500, 3000), (90, 40)])
@pytest.mark.parametrize("vision", ["siglip_so400m_14_384", "dinov2_s14_224"])
def test_the_padding_of_tiles_is_that_of_the_patches(size, vision):
    """An A4 page in cells of 3 x 3 leaves a quarter of its image tokens on nothing."""
    vision = presets.VISION[vision]
    for most in (1, 7, 10):
        tiles = images.tile_image(Image.new("RGB", size[::-1]), vision, most, use_overview=True)
        _, is_shown = labels.patch_boxes(tiles, vision)
        found = lengths.tiling(np.array([size]), vision, most, use_overview=True)
        assert found.tokens == is_shown.size
        # Cells that do not divide the page evenly may differ by a row of patches.
        assert found.padding == pytest.approx(1 - is_shown.mean(), abs=0.02)
        assert found.detail == pytest.approx(min(1, tiles.scales[-1].min()), rel=0.02)


def test_the_padding_of_several_pages_is_that_of_all_their_tokens():
    vision = presets.VISION["siglip_so400m_14_384"]
    both = lengths.tiling(np.array([(1169, 827), (378, 378)]), vision, 10, True)
    a4 = lengths.tiling(np.array([(1169, 827)]), vision, 10, True)
    assert a4.padding == pytest.approx(0.259, abs=0.001)
    assert both.tokens == (7290 + 729) / 2
    assert both.padding == pytest.approx(a4.padding * 7290 / (7290 + 729))
