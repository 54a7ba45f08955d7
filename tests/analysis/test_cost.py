"""What connectors cost: counted from real parameters and products, timed on real pages."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.analysis import cost
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from tests.conftest import TINY_CONNECTORS


@pytest.fixture(scope="module")
def loaded(trained_workdir):
    return loading.load(trained_workdir, loading.load_config(trained_workdir))


def test_costs(loaded):
    model = dataclasses.replace(loaded.config.model, connectors=TINY_CONNECTORS)
    small = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=model))
    found = cost.measure(small, ["align", "perceiver"], repeats=1)
    align, perceiver = found["costs"]
    assert align["num_params"] == sum(x.size for x in jax.tree.leaves(loaded.params["connector"]))
    assert (align["tokens_per_page"], perceiver["tokens_per_page"]) == (16, 10)
    vocab = loaded.config.model.llm.vocab_size
    width = 16
    patches = 16
    assert align["gflops"] == pytest.approx(2 * patches * (width * width + 2 * width * vocab) / 1e9)
    for one in (align, perceiver):
        assert one["answer_seconds"] > one["encode_seconds"] > 0
        assert one["tokens_per_second"] == pytest.approx(4 / one["answer_seconds"])
        assert one["temporary_mib"] > 0
    assert not found["left_out"]


def test_the_page_fills_its_tiles(loaded):
    page = Image.new("RGB", (45, 39), "white")
    row = loaded.builder.prompt(page, cost.QUESTION)
    prompt = cost.full_prompt(loaded)
    length = row["segment_ids"].sum()
    for name in ("tokens", "positions", "segment_ids"):
        np.testing.assert_array_equal(prompt[name], row[name][:length])
    assert prompt["tiles"].shape == row["tiles"].shape


def test_connectors_that_do_not_fit(loaded):
    """Tiles of 2 x 4 patches do not hold the 12 x 12 tokens that the c_abstractor makes by
    default."""
    with pytest.raises(UserError, match="pooled_rows is 12"):
        cost.measure(loaded, ["c_abstractor"], repeats=1)
    with pytest.raises(UserError, match="did you mean 'perceiver'"):
        cost.measure(loaded, ["perciever"], repeats=1)
