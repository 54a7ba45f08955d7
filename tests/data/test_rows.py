import dataclasses

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data import images, rows
from alignvlm_jax.data.pages import encode_png
from alignvlm_jax.data.schema import Batch, Record, Turn, Word
from alignvlm_jax.errors import UserError

TURNS = tuple(Turn(f"What is the {name}?", (f"{name} 1", "other")) for name in ("tax", "city", "due"))


def page_record(width=128, height=64, turns=TURNS, num_images=1, with_words=True) -> Record:
    image = encode_png(Image.fromarray(np.full((height, width), 7, np.uint8)))
    page = ((Word("ab", (0, 0, 16, 16)), Word("cd", (24, 0, 40, 16))), (Word("ef", (0, 16, 16, 32)),))
    lines = (page,) * num_images if with_words else ()
    return Record("r", "test", (image,) * num_images, turns, lines)


def answers(row, tokenizer) -> list[str]:
    """What the row teaches: the targets that carry loss, answer by answer."""
    taught = row["targets"][row["loss_weights"] > 0]
    parts = np.split(taught, np.flatnonzero(taught == tokenizer.specials["<end>"]) + 1)
    assert all(part[-1] == tokenizer.specials["<end>"] for part in parts[:-1]) and len(parts[-1]) == 0
    return [tokenizer.decode(part) for part in parts[:-1]]


def build(record, task, config, tokenizer, seed=0):
    return rows.build_row(record, task, np.random.default_rng(seed), config, tokenizer)


def test_a_row_has_the_arrays_of_a_batch(demo_config, tokenizer):
    row = build(page_record(), "answer", demo_config, tokenizer)
    assert set(row) == set(Batch.__annotations__)
    length = demo_config.data.row_length
    shapes = {name: array.shape for name, array in row.items()}
    assert shapes["tokens"] == shapes["targets"] == shapes["positions"] == (length,)
    assert shapes["tiles"] == (2, 32, 128, 3) and shapes["patch_label_ids"] == (2, 32, 3)
    assert row["tiles"].dtype == np.uint8 and row["tokens"].dtype == row["segment_ids"].dtype == np.int32
    assert row["loss_weights"].dtype == row["patch_loss_weights"].dtype == np.float32


def test_targets_are_the_next_tokens(demo_config, tokenizer):
    row = build(page_record(), "answer", demo_config, tokenizer)
    np.testing.assert_array_equal(row["targets"][:-1], row["tokens"][1:])
    used = int(row["segment_ids"].sum())
    assert (row["tokens"][used:] == tokenizer.pad_id).all() and (row["segment_ids"][:used] == 1).all()
    np.testing.assert_array_equal(row["positions"][:used], np.arange(used))
    assert not row["positions"][used:].any() and not row["loss_weights"][used:].any()


def test_transcription_teaches_the_lines(demo_config, tokenizer):
    row = build(page_record(), "transcribe", demo_config, tokenizer)
    assert answers(row, tokenizer) == ["ab cd\nef"]


def test_answers_come_in_random_order_and_teach_the_first(demo_config, tokenizer):
    orders = {tuple(answers(build(page_record(), "answer", demo_config, tokenizer, s), tokenizer)) for s in range(20)}
    assert len(orders) > 2
    assert all(sorted(order) == ["city 1", "due 1", "tax 1"] for order in orders)


def test_only_whole_turns_that_fit_are_kept(demo_config, tokenizer):
    config = dataclasses.replace(demo_config, data=dataclasses.replace(demo_config.data, row_length=64 + 1 + 15 + 3))
    row = build(page_record(), "answer", config, tokenizer)
    assert len(answers(row, tokenizer)) == 1
    long = (Turn("What is it?", ("x" * 200,)),)
    row = build(page_record(turns=long), "answer", config, tokenizer)
    assert not row["loss_weights"].any()
    assert (row["tokens"] == tokenizer.specials["<image>"]).sum() == 64


@pytest.mark.parametrize("size, num_tiles", [((128, 64), 2), ((128, 32), 1)])
def test_image_slots_and_tiles_agree(demo_config, tokenizer, size, num_tiles):
    row = build(page_record(*size), "answer", demo_config, tokenizer)
    slots = num_tiles * demo_config.model.slots_per_tile
    assert (row["tokens"][1 : 1 + slots] == tokenizer.specials["<image>"]).all()
    assert (row["tokens"] == tokenizer.specials["<image>"]).sum() == slots
    assert (row["tiles"][:num_tiles] == 7).all() and not row["tiles"][num_tiles:].any()
    np.testing.assert_allclose(row["patch_label_weights"][:num_tiles].sum(-1), 1, atol=1e-6)
    assert not row["patch_loss_weights"][num_tiles:].any()


def test_several_images_share_the_tiles(demo_config, tokenizer):
    row = build(page_record(128, 32, num_images=2), "transcribe", demo_config, tokenizer)
    assert (row["tiles"] == 7).all()
    assert answers(row, tokenizer) == ["ab cd\nef\nab cd\nef"]
    larger = build(page_record(128, 64, num_images=2), "answer", demo_config, tokenizer)
    assert (larger["tiles"][:, :, :64] == 7).all() and (larger["tiles"][:, :, 64:] == 255).all()
    with pytest.raises(UserError, match="3 images"):
        build(page_record(num_images=3), "answer", demo_config, tokenizer)


def test_unknown_words_carry_no_patch_loss(demo_config, tokenizer):
    row = build(page_record(with_words=False), "answer", demo_config, tokenizer)
    assert not row["patch_loss_weights"].any() and row["loss_weights"].any()
    np.testing.assert_allclose(row["patch_label_weights"].sum(-1), 1)
    assert not build(page_record(with_words=False), "transcribe", demo_config, tokenizer)["loss_weights"].any()


def test_prompt_is_the_beginning_of_the_training_row(demo_config, tokenizer):
    record = page_record(turns=TURNS[:1])
    row = build(record, "answer", demo_config, tokenizer)
    prompt = rows.build_prompt(record, TURNS[0].question, demo_config, tokenizer)
    used = int(prompt["segment_ids"].sum())
    np.testing.assert_array_equal(prompt["tokens"][:used], row["tokens"][:used])
    assert prompt["tokens"][used - 1] == tokenizer.specials["<assistant>"] and row["loss_weights"][used - 1] > 0
    assert not prompt["loss_weights"].any()
    np.testing.assert_array_equal(prompt["tiles"], row["tiles"])
    image = images.decode_image(record.images[0], "x")
    from_image = rows.build_prompt(image, TURNS[0].question, demo_config, tokenizer)
    for name in ("tokens", "tiles"):
        np.testing.assert_array_equal(from_image[name], prompt[name])
    assert not [name for name in prompt if "patch" in name]


def test_a_prompt_that_is_too_long_is_a_user_error(demo_config, tokenizer):
    with pytest.raises(UserError, match=r"67 tokens|row_length is 144"):
        rows.build_prompt(page_record(), "x" * 200, demo_config, tokenizer)


def test_a_trimmed_prompt_keeps_its_tokens_and_used_tiles(demo_config, tokenizer):
    page = Image.new("RGB", (16, 16))  # Black: a used tile may be all zeros.
    prompt = rows.build_prompt(page, "Who?", demo_config, tokenizer)
    trimmed = rows.trim_prompt(prompt, demo_config, multiple=16)
    used = int(prompt["segment_ids"].sum())
    assert len(prompt["tokens"]) > len(trimmed["tokens"]) == -(-used // 16) * 16
    for name in ("tokens", "positions", "segment_ids"):
        np.testing.assert_array_equal(trimmed[name], prompt[name][: len(trimmed[name])])
    assert len(prompt["tiles"]) == 2 and len(trimmed["tiles"]) == 1


def test_a_prompt_without_a_page_has_no_image_slots_and_no_tiles(demo_config, tokenizer):
    prompt = rows.build_prompt(None, "Who?", demo_config, tokenizer)
    assert "tiles" not in prompt and not (prompt["tokens"] == demo_config.model.image_token_id).any()
    assert "tiles" not in rows.trim_prompt(prompt, demo_config)
