"""Training steps of a small model beside the same model in torch and transformers: the losses that
`make bench-train` and `make bench-gpu` compare."""

import json

import numpy as np
import pytest
import torch

from tests.bench import gpu, gpu_parts, gpu_torch, train, training_ours, training_torch


@pytest.mark.parametrize("connector", train.CONNECTORS)
def test_losses_of_training_steps_are_torchs(tmp_path, connector):
    num_params, ours = training_ours.start("tiny", connector, tmp_path)
    num_theirs, theirs = training_torch.start("tiny", connector, tmp_path)
    # Each of our parameters is there, and nothing else.
    assert num_params == num_theirs
    losses = [(ours(), theirs()) for _ in range(train.LOSSES)]
    assert losses[-1][0] < losses[0][0]
    for mine, wanted in losses:
        np.testing.assert_allclose(mine, wanted, rtol=train.TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", gpu_torch.TOLERANCE)]
)
def test_losses_of_packed_sequences_are_torchs(tmp_path, dtype, tolerance):
    """Of rows of several documents with several tiles, through "triton" and through torch.compile."""
    gpu_parts.step(True, tmp_path, "triton", dtype)
    ours = json.loads((tmp_path / "ours.json").read_text())["losses"]
    step = gpu_torch.start(tmp_path, "cpu", getattr(torch, dtype))
    theirs = [step() for _ in range(gpu.LOSSES)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    np.testing.assert_allclose(theirs, ours, rtol=tolerance)


def test_block_mask_is_that_of_all_pairs():
    """Forward; of a backward pass flex_attention has none on CPU."""
    torch.manual_seed(0)
    segment_ids = torch.tensor([[1] * 100 + [2] * 160 + [0] * 40, [1] * 300])
    query, key, value = (torch.randn(2, heads, 300, 16) for heads in (4, 2, 2))
    mixed = [
        gpu_torch.attend(None, query, key, value, gpu_torch.mask_of(segment_ids, blocks), 0.25)[0]
        for blocks in (True, False)
    ]
    torch.testing.assert_close(*mixed)


def test_losses_that_differ_are_an_error(monkeypatch):
    """With those of both sides, and no times."""

    class Side:
        num_params = 1

        def __init__(self, name, *_):
            self.loss = {"ours": 2.0, "torch": 2.001}[name]

        def step(self):
            return train.Step(self.loss, 1.0, 1.0)

        def end(self):
            pass

    monkeypatch.setattr(train, "Side", Side)
    with pytest.raises(SystemExit, match=r"demonstration, mlp: losses differ by 5.0e-04.*2.001"):
        train.row("demonstration", "mlp", 5, 1)
    monkeypatch.setattr(train, "TOLERANCE", 1e-3)
    assert "| demonstration | mlp | 1 | 1.000 | 1.000 | **1.00**" in train.row(
        "demonstration", "mlp", 5, 1
    )
