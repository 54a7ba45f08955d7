"""What connectors cost: counted from real parameters and matmuls, timed on real pages; a bar a
connector and a quantity, and the sentence of the report."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.analysis import cost
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.pictures import plotting
from tests.conftest import TINY_CONNECTORS
from tests.pictures.pictures import area, decode

ANALYSIS = cost.ConnectorCosts()


@pytest.fixture(scope="module")
def loaded(trained_workdir):
    return loading.load(trained_workdir, loading.load_config(trained_workdir))


def test_costs(loaded):
    model = dataclasses.replace(loaded.config.model, connectors=TINY_CONNECTORS)
    small = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=model))
    found = cost.measure(small, ["align", "perceiver"], repeats=3)
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
        assert one["temporary_mib"] > 0 and one["encode_spread"] >= 0
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


def one_cost(name: str, factor: int = 1) -> dict:
    return {
        "connector": name,
        "num_params": 1000 * factor,
        "encode_seconds": 0.01 * factor,
        "tokens_per_page": 8 * factor,
    }


def test_bars_are_told_apart():
    two = {"costs": [one_cost("align", 3), one_cost("mlp")]}
    image = decode(ANALYSIS.picture("mlp", two))
    assert image.shape[1] == cost.WIDTH * plotting.DPI
    quiet = area(image, plotting.QUIET)
    own = area(image, plotting.COLORS[0])
    assert 2.8 < quiet / own < 3.2
    three = {"costs": [one_cost("align"), one_cost("mlp"), one_cost("ovis")]}
    assert len(decode(ANALYSIS.picture("mlp", three))) > len(image)


@pytest.mark.parametrize(
    ("connector", "spread", "words"),
    [
        ("align", {"encode_spread": 0.1}, "; with mlp, the quickest, 1.00 ms."),
        ("align", {"encode_spread": 0.4}, "are not compared, for on this machine they differed "),
        ("align", {}, "; measured one connector after the other, times are not compared."),
        ("mlp", {"encode_spread": 0.1}, "With mlp, 2 K parameters, a page takes 1.00 ms"),
    ],
)
def test_sentence(connector, spread, words):
    """A busy machine's noise is not told as a fact, nor what an earlier version measured."""
    costs = [
        {"connector": name, "num_params": 2000, "encode_seconds": seconds, "tokens_per_page": 32}
        | spread
        for name, seconds in (("align", 0.002), ("mlp", 0.001))
    ]
    fields = {"connector": connector, "costs": costs, "device": "1 x cpu"}
    assert words in ANALYSIS.sentence(fields)
    # A model whose own connector was not asked for.
    assert "With align" in ANALYSIS.sentence(fields | {"connector": "ovis"})
