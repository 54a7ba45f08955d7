import dataclasses

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax import config as config_lib
from alignvlm_jax.data import examples, images, sequences
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.images import encode_png
from alignvlm_jax.data.record import Batch, Record, Turn, Word
from alignvlm_jax.errors import UserError

TURNS = tuple(
    Turn(f"What is the {name}?", (f"{name} 1", "other")) for name in ("tax", "city", "due")
)


def page_record(width=128, height=64, turns=TURNS, num_images=1, with_words=True) -> Record:
    image = encode_png(Image.fromarray(np.full((height, width), 7, np.uint8)))
    page = (
        (Word("ab", (0, 0, 16, 16)), Word("cd", (24, 0, 40, 16))),
        (Word("ef", (0, 16, 16, 32)),),
    )
    lines = (page,) * num_images if with_words else ()
    return Record("r", "test", (image,) * num_images, turns, lines)


def answers(row, tokenizer) -> list[str]:
    """What the row teaches: the targets that carry loss, answer by answer."""
    taught = row["targets"][row["loss_weights"] > 0]
    parts = np.split(taught, np.flatnonzero(taught == tokenizer.special_tokens["<end>"]) + 1)
    assert (
        all(part[-1] == tokenizer.special_tokens["<end>"] for part in parts[:-1])
        and len(parts[-1]) == 0
    )
    return [tokenizer.decode(part) for part in parts[:-1]]


def build(record, task, config, tokenizer, seed=0):
    builder = ExampleBuilder.of(config, tokenizer)
    return builder.sequence(record, task, np.random.default_rng(seed))


def test_a_row_has_the_arrays_of_a_batch(demo_config, tokenizer):
    row = build(page_record(), "answer", demo_config, tokenizer)
    assert set(row) == set(Batch.__annotations__) - {"kept_patches"}
    length = demo_config.data.seq_len
    shapes = {name: array.shape for name, array in row.items()}
    assert shapes["tokens"] == shapes["targets"] == shapes["positions"] == (length,)
    assert shapes["tiles"] == (2, 32, 128, 3) and shapes["patch_label_ids"] == (2, 32, 3)
    assert (
        row["tiles"].dtype == np.uint8
        and row["tokens"].dtype == row["segment_ids"].dtype == np.int32
    )
    assert row["loss_weights"].dtype == row["patch_loss_weights"].dtype == np.float32


def test_targets_are_the_next_tokens(demo_config, tokenizer):
    row = build(page_record(), "answer", demo_config, tokenizer)
    np.testing.assert_array_equal(row["targets"][:-1], row["tokens"][1:])
    used = int(row["segment_ids"].sum())
    assert (row["tokens"][used:] == tokenizer.pad_id).all() and (
        row["segment_ids"][:used] == 1
    ).all()
    np.testing.assert_array_equal(row["positions"][:used], np.arange(used))
    assert not row["positions"][used:].any() and not row["loss_weights"][used:].any()


def test_transcription_teaches_the_lines(demo_config, tokenizer):
    row = build(page_record(), "transcribe", demo_config, tokenizer)
    assert answers(row, tokenizer) == ["ab cd\nef"]


def test_plain_text_is_predicted_from_its_second_token_on(tokenizer):
    tokens = np.array([5, 9, 7], np.int32)
    row = sequences.build_text(tokens, 5, tokenizer)
    pad = tokenizer.pad_id
    assert {name: array.tolist() for name, array in row.items()} == {
        "tokens": [5, 9, 7, pad, pad],
        "targets": [9, 7, pad, pad, pad],
        "loss_weights": [1, 1, 0, 0, 0],
        "positions": [0, 1, 2, 0, 0],
        "segment_ids": [1, 1, 1, 0, 0],
    }
    assert sequences.build_text(tokens, 3, tokenizer)["loss_weights"].tolist() == [1, 1, 0]


def test_answers_come_in_random_order_and_teach_the_first(demo_config, tokenizer):
    orders = {
        tuple(answers(build(page_record(), "answer", demo_config, tokenizer, s), tokenizer))
        for s in range(20)
    }
    assert len(orders) > 2
    assert all(sorted(order) == ["city 1", "due 1", "tax 1"] for order in orders)


def test_only_whole_turns_that_fit_are_kept(demo_config, tokenizer):
    config = dataclasses.replace(
        demo_config, data=dataclasses.replace(demo_config.data, seq_len=64 + 1 + 15 + 3)
    )
    row = build(page_record(), "answer", config, tokenizer)
    assert len(answers(row, tokenizer)) == 1
    long = (Turn("What is it?", ("x" * 200,)),)
    row = build(page_record(turns=long), "answer", config, tokenizer)
    assert not row["loss_weights"].any()
    assert (row["tokens"] == tokenizer.special_tokens["<image>"]).sum() == 64


@pytest.mark.parametrize("size, num_tiles", [((128, 64), 2), ((128, 32), 1)])
def test_image_slots_and_tiles_agree(demo_config, tokenizer, size, num_tiles):
    row = build(page_record(*size), "answer", demo_config, tokenizer)
    slots = num_tiles * demo_config.model.tokens_per_tile
    assert (row["tokens"][1 : 1 + slots] == tokenizer.special_tokens["<image>"]).all()
    assert (row["tokens"] == tokenizer.special_tokens["<image>"]).sum() == slots
    assert (row["tiles"][:num_tiles] == 7).all() and not row["tiles"][num_tiles:].any()
    np.testing.assert_allclose(row["patch_label_weights"][:num_tiles].sum(-1), 1, atol=1e-6)
    assert not row["patch_loss_weights"][num_tiles:].any()


def test_labels_stand_one_for_each_patch_and_prompts_as_the_connector_does(demo_config, tokenizer):
    model = dataclasses.replace(demo_config.model, connector=config_lib.connector("h_reducer"))
    pixels = dataclasses.replace(demo_config, model=model)
    labels = dataclasses.replace(
        pixels, train=dataclasses.replace(pixels.train, visual_source="oracle")
    )
    for config, in_row in ((pixels, 2 * 8), (labels, 2 * 32)):
        prompt = ExampleBuilder.of(config, tokenizer).prompt(page_record(128, 64), "What is it?")
        assert (prompt["tokens"] == tokenizer.special_tokens["<image>"]).sum() == 2 * 8
        row = build(page_record(128, 64), "answer", config, tokenizer)
        assert (row["tokens"] == tokenizer.special_tokens["<image>"]).sum() == in_row
        assert row["patch_label_ids"].shape == (2, 32, 3)


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
    assert not build(page_record(with_words=False), "transcribe", demo_config, tokenizer)[
        "loss_weights"
    ].any()


@pytest.mark.parametrize("changes", [{"visual_source": "oracle"}, {"answer_weight": 0.0}])
def test_what_learns_from_words_takes_no_image_without_them(demo_config, tokenizer, changes):
    """A model that reads labels would see a blank page, and be taught to answer of it."""
    config = dataclasses.replace(
        demo_config, train=dataclasses.replace(demo_config.train, **changes)
    )
    assert build(page_record(), "answer", config, tokenizer)["loss_weights"].any()
    with pytest.raises(UserError, match="does not know the words of its images"):
        build(page_record(with_words=False), "answer", config, tokenizer)


def test_a_share_of_the_records_is_labelled(demo_config, tokenizer):
    """Those of a smaller share are among those of a larger; nothing else of a row changes."""

    def labelled(fraction: float) -> set[str]:
        config = dataclasses.replace(
            demo_config, data=dataclasses.replace(demo_config.data, labelled_fraction=fraction)
        )
        built = {record.id: build(record, "answer", config, tokenizer) for record in records}
        for name, row in built.items():
            assert all(
                np.array_equal(row[field], whole[name][field])
                for field in row
                if not field.startswith("patch_")
            )
        return {name for name, row in built.items() if row["patch_loss_weights"].any()}

    records = [dataclasses.replace(page_record(), id=f"record {i}") for i in range(100)]
    whole = {record.id: build(record, "answer", demo_config, tokenizer) for record in records}
    few = labelled(0.1)
    many = labelled(0.5)
    assert not labelled(0.0) and len(labelled(1.0)) == 100
    assert few < many and 3 <= len(few) <= 20 and 35 <= len(many) <= 65


@pytest.mark.parametrize("weight, source", [(0.0, "pixels"), (1.0, "pixels"), (0.0, "oracle")])
def test_labels_are_made_where_a_stage_uses_them(
    demo_config, tokenizer, monkeypatch, weight, source
):
    """They were a third of the time of a page of the paper's stages, which use none."""
    made = []
    patch_labels = examples.labels.patch_labels
    monkeypatch.setattr(
        examples.labels, "patch_labels", lambda *args: made.append(args) or patch_labels(*args)
    )
    train = dataclasses.replace(demo_config.train, patch_token_weight=weight, visual_source=source)
    data = dataclasses.replace(demo_config.data, labelled_fraction=0.5)
    config = dataclasses.replace(demo_config, train=train, data=data)
    for i in range(40):
        record = dataclasses.replace(page_record(128, 32), id=f"record {i}")
        row = build(record, "answer", config, tokenizer)
        # The weights of the labels sum to 1 whether they are known or not.
        np.testing.assert_allclose(row["patch_label_weights"][0].sum(-1), 1)
    # As the input they are needed of all records, whatever fraction is labelled in the loss.
    low, high = {(0.0, "pixels"): (0, 0), (1.0, "pixels"): (8, 32), (0.0, "oracle"): (40, 40)}[
        weight, source
    ]
    assert low <= len(made) <= high


def test_prompt_is_the_beginning_of_the_training_row(demo_config, tokenizer):
    record = page_record(turns=TURNS[:1])
    row = build(record, "answer", demo_config, tokenizer)
    prompt = ExampleBuilder.of(demo_config, tokenizer).prompt(record, TURNS[0].question)
    used = int(prompt["segment_ids"].sum())
    np.testing.assert_array_equal(prompt["tokens"][:used], row["tokens"][:used])
    assert (
        prompt["tokens"][used - 1] == tokenizer.special_tokens["<assistant>"]
        and row["loss_weights"][used - 1] > 0
    )
    assert not prompt["loss_weights"].any()
    np.testing.assert_array_equal(prompt["tiles"], row["tiles"])
    image = images.decode_image(record.images[0], "x")
    from_image = ExampleBuilder.of(demo_config, tokenizer).prompt(image, TURNS[0].question)
    for name in ("tokens", "tiles"):
        np.testing.assert_array_equal(from_image[name], prompt[name])
    assert not [name for name in prompt if "patch" in name]


def test_a_prompt_that_is_too_long_is_a_user_error(demo_config, tokenizer):
    with pytest.raises(UserError, match=r"67 tokens|seq_len is 160"):
        ExampleBuilder.of(demo_config, tokenizer).prompt(page_record(), "x" * 200)


def test_trimmed_prompts_keep_their_tokens_and_used_tiles(demo_config, tokenizer):
    page = Image.new("RGB", (16, 16))  # Black: a used tile may be all zeros.
    prompts = [
        ExampleBuilder.of(demo_config, tokenizer).prompt(page, question)
        for question in ("Who?", "Who" * 9)
    ]
    extent = ExampleBuilder.of(demo_config, tokenizer).extent(prompts, multiple=16)
    trimmed = [sequences.trim(prompt, *extent) for prompt in prompts]
    lengths = [int(prompt["segment_ids"].sum()) for prompt in prompts]
    assert lengths[0] < lengths[1] and len(prompts[0]["tiles"]) == 2
    for before, after in zip(prompts, trimmed, strict=True):
        assert len(before["tokens"]) > len(after["tokens"]) == -(-lengths[1] // 16) * 16
        assert len(after["tiles"]) == 1
        for name in ("tokens", "positions", "segment_ids", "tiles"):
            np.testing.assert_array_equal(after[name], before[name][: len(after[name])])


def test_a_prompt_of_a_record_without_images_goes_into_one_batch_with_others(
    demo_config, tokenizer
):
    with_image, without = (
        ExampleBuilder.of(demo_config, tokenizer).prompt(record, "Who?")
        for record in (page_record(), dataclasses.replace(page_record(), images=(), lines=()))
    )
    assert {name: array.shape for name, array in with_image.items()} == {
        name: array.shape for name, array in without.items()
    }
    assert (
        not without["tiles"].any()
        and not (without["tokens"] == demo_config.model.image_token_id).any()
    )


def test_a_prompt_without_a_page_has_no_image_slots_and_no_tiles(demo_config, tokenizer):
    prompt = ExampleBuilder.of(demo_config, tokenizer).prompt(None, "Who?")
    assert (
        "tiles" not in prompt and not (prompt["tokens"] == demo_config.model.image_token_id).any()
    )
    assert "tiles" not in ExampleBuilder.of(demo_config, tokenizer).trim_prompts([prompt])[0]


def planned(config, **fields):
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, packing="offline", **fields)
    )


def build_parts(config, tokenizer):
    records = [
        page_record(128, 64),
        page_record(128, 32, TURNS[:1]),
        page_record(128, 32, num_images=2),
    ]
    return [
        ExampleBuilder.of(config, tokenizer).segment(record, task, np.random.default_rng(0))
        for record, task in zip(records, ("answer", "answer", "transcribe"), strict=True)
    ]


def test_parts_stand_in_a_row_as_they_would_alone(demo_config, tokenizer):
    config = planned(demo_config, seq_len=400, max_tiles=6, record_tiles=2)
    parts = build_parts(config, tokenizer)
    row = ExampleBuilder.of(config, tokenizer).join(parts)
    assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
        name: (array.shape, array.dtype)
        for name, array in ExampleBuilder.of(config, tokenizer).join([]).items()
    }
    tile = 0
    for number, part in enumerate(parts, start=1):
        alone = ExampleBuilder.of(config, tokenizer).join([part])
        here = row["segment_ids"] == number
        used = alone["segment_ids"] == 1
        assert np.ptp(np.flatnonzero(here)) == here.sum() - 1 == used.sum() - 1
        for name in ("tokens", "targets", "loss_weights", "positions"):
            np.testing.assert_array_equal(row[name][here], alone[name][used], err_msg=name)
        num_tiles = (
            part.tokens == config.model.image_token_id
        ).sum() // config.model.tokens_per_tile
        for name, array in part.tile_arrays.items():
            assert len(array) == num_tiles > 0
            np.testing.assert_array_equal(row[name][tile : tile + num_tiles], array, err_msg=name)
            np.testing.assert_array_equal(alone[name][:num_tiles], array, err_msg=name)
        tile += num_tiles
    assert tile == 5 and not row["tiles"][5:].any() and not row["patch_loss_weights"][5:].any()
    padding = row["segment_ids"] == 0
    assert padding.any() and not any(
        row[name][padding].any() for name in ("tokens", "positions", "loss_weights")
    )


def test_a_row_of_nothing_is_padding(demo_config, tokenizer):
    row = ExampleBuilder.of(demo_config, tokenizer).join([])
    assert not any(row[name].any() for name in row if name != "patch_label_ids")


def test_loss_by_record_weighs_records_alike(demo_config, tokenizer):
    by_token = build_parts(planned(demo_config, seq_len=400), tokenizer)
    by_record = build_parts(
        planned(demo_config, seq_len=400, loss_normalisation="record"), tokenizer
    )
    for tokens, record in zip(by_token, by_record, strict=True):
        np.testing.assert_array_equal(tokens.loss_weights > 0, record.loss_weights > 0)
        assert set(tokens.loss_weights) == {0, 1} and record.loss_weights.sum() == pytest.approx(1)
        assert len(set(record.loss_weights)) == 2
    assert len({part.loss_weights.sum() for part in by_token}) == 3


def test_a_transcription_is_cut_at_the_end_of_a_planned_row(demo_config, tokenizer):
    record = page_record(num_images=2)
    whole = build(record, "transcribe", demo_config, tokenizer)
    length = int(whole["segment_ids"].sum())
    for shorter in (1, 2, 9):
        config = planned(demo_config, seq_len=length - shorter)
        part = ExampleBuilder.of(config, tokenizer).segment(
            record, "transcribe", np.random.default_rng(0)
        )
        np.testing.assert_array_equal(part.tokens, whole["tokens"][: length - shorter])
        taught = tokenizer.decode(part.tokens[1:][part.loss_weights[:-1] > 0])
        assert "ab cd\nef\nab cd\nef".startswith(taught) and len(taught) == 17 - (shorter - 1)
        assert tokenizer.special_tokens["<end>"] not in part.tokens
    # As ever without a plan: what does not fit is left out.
    short = dataclasses.replace(
        demo_config, data=dataclasses.replace(demo_config.data, seq_len=length - 1)
    )
    assert not build(record, "transcribe", short, tokenizer)["loss_weights"].any()


def test_a_planned_row_has_no_place_for_a_record_without_an_answer(demo_config, tokenizer):
    config = planned(demo_config, seq_len=68)
    for task in ("answer", "transcribe"):  # Of 68 tokens, 64 are the image's: no answer begins.
        with pytest.raises(
            UserError, match=r"record r has no answer that fits config.data.seq_len 68"
        ):
            build(page_record(), task, config, tokenizer)


def test_a_record_may_have_fewer_tiles_than_a_row(demo_config, tokenizer):
    config = planned(demo_config, seq_len=400, max_tiles=6, record_tiles=1)
    part = ExampleBuilder.of(config, tokenizer).segment(
        page_record(128, 64), "answer", np.random.default_rng(0)
    )
    assert len(part.tile_arrays["tiles"]) == 1
    assert (
        len(ExampleBuilder.of(config, tokenizer).prompt(page_record(128, 64), "Who?")["tiles"]) == 1
    )
    with pytest.raises(UserError, match=r"record r has 2 images; config.data.record_tiles is 1"):
        build(page_record(num_images=2), "answer", config, tokenizer)
