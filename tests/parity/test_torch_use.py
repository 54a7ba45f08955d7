"""An exported folder as people use a model of transformers: beams, caches, devices, training,
saving, pipelines; and what it refuses."""

import copy
import shutil

import numpy as np
import pytest
import torch
import transformers

import alignvlm_jax
from tests import exports
from tests.parity.test_transformers import QUESTION, Theirs, export, noise

NUM_NEW = 6
FORCED = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(trained_workdir, tmp_path_factory):
    root = tmp_path_factory.mktemp("torch_use")
    exports.write_workdir(root / "run", trained_workdir, "align")
    return export(root / "run", root / "out")


@pytest.fixture(scope="module")
def theirs(folder):
    return Theirs(folder)


@pytest.fixture(scope="module")
def inputs(theirs):
    """Of a page of two tiles."""
    return theirs.processor(images=noise(2, 16, 16), text=QUESTION)


def new_tokens(theirs, inputs, **options):
    out = theirs.model.generate(**inputs, **FORCED, **options)
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 1}])
def test_repeated_rows_keep_their_tiles(theirs, inputs, options):
    """Of several tiles, in a batch with other numbers of them."""
    options = options | {"num_return_sequences": 3}
    seen = {"output_logits": True, "return_dict_in_generate": True}
    first = theirs.model.generate(**inputs, **FORCED, **options, **seen).logits[0]
    expected = theirs.model(**inputs).logits[:, -1].detach()
    torch.testing.assert_close(first, expected.expand(3, -1), atol=2e-4, rtol=0)
    pages = [noise(3, 16, 8), noise(2, 16, 16), None]
    batch = theirs.processor(images=pages, text=["Who?", QUESTION, "a b"])
    assert new_tokens(theirs, batch, **options)[3:6].equal(new_tokens(theirs, inputs, **options))


def test_a_page_is_read_onto_a_cache(theirs, inputs):
    """A second page, after an answer about the first."""
    second = theirs.processor(images=noise(5, 16, 8), text="Who?")
    first = theirs.model.generate(**inputs, **FORCED, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, second["input_ids"]], 1)
    pixels = torch.cat([inputs["pixel_values"], second["pixel_values"]])
    cached = theirs.model.generate(
        ids,
        pixel_values=second["pixel_values"],
        past_key_values=first.past_key_values,
        **FORCED,
    )
    assert cached.equal(theirs.model.generate(ids, pixel_values=pixels, **FORCED))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_caches_of_other_kinds(theirs, inputs, options):
    assert new_tokens(theirs, inputs, **options).equal(new_tokens(theirs, inputs))


@torch.no_grad()
def test_a_generated_image_token_is_a_token(theirs, inputs):
    """That of the tiny model has a row in the table, which is what alignvlm_jax reads."""
    model = theirs.model
    cache = model(**inputs, use_cache=True).past_key_values
    token = torch.tensor([[model.config.image_token_id]])
    found = model(token, past_key_values=copy.deepcopy(cache)).logits
    row = model.get_input_embeddings()(token)
    assert found.equal(model(inputs_embeds=row, past_key_values=cache).logits)


def test_prompt_embeddings_are_generated_from(theirs, inputs):
    x = theirs.model.embed(inputs["input_ids"], inputs["pixel_values"])
    found = theirs.model.generate(
        inputs_embeds=x, attention_mask=inputs["attention_mask"], **FORCED
    )
    assert found.equal(new_tokens(theirs, inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, r"\d+ image tokens and 0 visual tokens"),
        ({"pixel_values": torch.zeros(0, 3, 8, 16)}, r"\d+ image tokens and 0 visual tokens"),
        ({"pixel_values": torch.zeros(2, 3, 16, 8)}, r"are \[2, 3, 16, 8\]; each tile is \[3, 8"),
        ({"input_ids": None}, "input_ids or inputs_embeds are needed"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 16)}, "give no pixel_values"),
    ],
)
def test_pages_are_never_dropped_in_silence(theirs, inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        theirs.model(**inputs | changes)


def test_what_is_offloaded_to_a_disk_is_right_or_refused(folder, theirs, inputs, tmp_path):
    options = {"trust_remote_code": True, "offload_folder": tmp_path, "dtype": torch.float32}
    load = transformers.AutoModelForCausalLM.from_pretrained
    for parts in ({"": "disk"}, {"vision": "disk", "connector": "cpu", "llm": "cpu"}):
        with pytest.raises(ValueError, match="cannot be offloaded: give them a device"):
            load(folder, device_map=parts, **options)(**inputs)
    layers = [name for name, _ in theirs.model.llm.model.named_children()]
    parts = {f"llm.model.{name}": "cpu" for name in layers if name != "layers"}
    last = len(theirs.model.llm.model.layers) - 1
    parts |= {f"llm.model.layers.{i}": "disk" if i == last else "cpu" for i in range(last + 1)}
    parts |= {"vision": "cpu", "connector": "cpu", "llm.lm_head": "cpu"}
    found = load(folder, device_map=parts, **options)(**inputs).logits
    assert found.equal(theirs.model(**inputs).logits)


def test_the_language_model_has_a_type_of_its_own(theirs, inputs):
    """As where it alone is quantised."""
    model = copy.deepcopy(theirs.model)
    model.llm.to(torch.bfloat16)
    expected = theirs.model(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_it_is_trained_in_torch(theirs, inputs):
    """Every parameter has a gradient, the same with checkpointing; images are nobody's labels."""
    labels = inputs["input_ids"].clone()
    is_image = labels == theirs.model.config.image_token_id
    masked = labels.masked_fill(is_image, -100)
    loss = theirs.model(**inputs, labels=labels).loss
    assert loss.equal(theirs.model(**inputs, labels=masked).loss) and is_image.any()

    def gradients(model):
        model.train()(**inputs, labels=labels).loss.backward()
        return {name: x.grad for name, x in model.named_parameters()}

    expected = gradients(copy.deepcopy(theirs.model))
    model = copy.deepcopy(theirs.model)
    model.gradient_checkpointing_enable()
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name], msg=name)


def test_a_table_grows_and_keeps_its_answers(theirs, inputs):
    model = copy.deepcopy(theirs.model)
    size = model.config.get_text_config().vocab_size
    model.resize_token_embeddings(size + 3)
    found = model(**inputs).logits
    assert found.shape[-1] == size + 3
    torch.testing.assert_close(found[..., :size], theirs.model(**inputs).logits)
    model.resize_token_embeddings(size - 1)
    with pytest.raises(ValueError, match=f"averages {size} tokens, and {size - 1} are left"):
        model(**inputs)


def test_a_new_model_is_initialised(folder, inputs):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    parameters = dict(model.named_parameters())
    assert all(x.isfinite().all() and x.abs().max() <= 1 for x in parameters.values())
    assert parameters["vision.final_norm.scale"].eq(1).all()
    assert parameters["vision.positions"].std() > 0 and model(**inputs).logits.isfinite().all()


def test_model_and_processor_are_saved_elsewhere(folder, theirs, inputs, tmp_path):
    """A folder of their own, which alignvlm_jax reads as well."""
    model = copy.deepcopy(theirs.model)
    model.connector.w1.kernel.data.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    theirs.processor.save_pretrained(tmp_path / "tuned")
    # Into its own folder nothing is copied.
    theirs.processor.save_pretrained(folder)
    again = Theirs(shutil.move(tmp_path / "tuned", tmp_path / "moved"))
    assert again.processor(images=noise(2, 16, 16), text=QUESTION)["input_ids"].equal(
        inputs["input_ids"]
    )
    assert again.model(**inputs).logits.equal(model(**inputs).logits)
    kernel = alignvlm_jax.load(tmp_path / "moved").loaded.params["connector"]["w1"]["kernel"]
    np.testing.assert_array_equal(kernel, model.connector.w1.kernel.detach().numpy())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_kind_of_attention(folder, theirs, inputs, attention):
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention
    )
    torch.testing.assert_close(
        model(**inputs).logits, theirs.model(**inputs).logits, atol=2e-4, rtol=0
    )


def test_pipelines_and_streamers(folder, theirs, capsys):
    pages = [noise(2, 16, 16), noise(3, 16, 8)]
    questions = [QUESTION, "Who?"]
    inputs = [theirs.processor(images=x, text=y) for x, y in zip(pages, questions, strict=True)]
    options = {"max_new_tokens": NUM_NEW}
    expected = [
        theirs.processor.decode(
            theirs.model.generate(**one, **options)[0, one["input_ids"].shape[1] :]
        )
        for one in inputs
    ]
    pipeline = transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    found = pipeline(images=pages, text=questions, **options)
    assert [one["generated_text"] for one in found] == [
        question + answer for question, answer in zip(questions, expected, strict=True)
    ]
    content = [{"type": "image", "image": pages[0]}, {"type": "text", "text": QUESTION}]
    [told] = pipeline(
        text=[{"role": "user", "content": content}], return_full_text=False, **options
    )
    assert told["generated_text"] == expected[0]
    streamer = transformers.TextStreamer(
        theirs.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    capsys.readouterr()
    theirs.model.generate(**inputs[0], **options, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == expected[0].rstrip("\n")
