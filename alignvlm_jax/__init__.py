"""Document vision-language models with the ALIGN connector (arXiv 2502.01341), in JAX."""

from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
    from alignvlm_jax.inference.assistant import Assistant

__version__ = "0.1.0"


def load(
    checkpoint: str | os.PathLike[str], data: str | os.PathLike[str] | None = None
) -> Assistant:
    """Loads a trained model, to ask it about pages: `load("runs/demo").answer("page.png", "What is
    the total?")`.

    Args:
      checkpoint: a workdir, whose newest checkpoint is taken, one checkpoint folder
        `checkpoints/STEP`, or a folder that `convert --export` wrote.
      data: the folder with the tokenizer; by default the one trained on.

    Raises:
      UserError: there is no readable checkpoint, or its tokenizer is missing.
    """
    # Late: whoever needs the data alone has no need of jax, and no time for it.
    from alignvlm_jax.inference import assistant

    return assistant.load(checkpoint, data)
