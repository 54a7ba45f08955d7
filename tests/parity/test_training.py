"""Five training steps of a small model beside the same model in torch and transformers: the losses
that `make bench-train` compares before it tells a time."""

import numpy as np
import pytest

from tests.bench import train, training_ours, training_torch


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
        train.row("demonstration", "mlp", 5)
    monkeypatch.setattr(train, "TOLERANCE", 1e-3)
    assert "| demonstration | mlp | 1 | 1.000 | 1.000 | **1.00**" in train.row(
        "demonstration", "mlp", 5
    )
