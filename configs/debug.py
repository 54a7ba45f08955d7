"""A config for debugging: two layers in each tower, one device, and nothing is compiled.

    python -m alignvlm_jax train --config=configs/debug.py --workdir=runs/debug --debug

With `train.jit` off every operation of a step runs by itself, so that `print(x_BTD)` shows numbers,
and `breakpoint()` in `models/` or `train/step.py` stops at them; layers are a Python loop, since a
`lax.scan` that is not compiled is one. A step takes seconds, the first one most. It learns nothing
to speak of; `configs/demo.py` does. On a machine with several devices, show it one of them:
JAX_PLATFORMS=cpu, or CUDA_VISIBLE_DEVICES=0.
"""

import ml_collections

from configs import demo


def get_config(connector: str = "align") -> ml_collections.ConfigDict:
    """Returns one stage on the demonstration's data, with the given connector."""
    config = demo.get_config(connector)
    config.name = "debug"
    config.stages = ml_collections.ConfigDict({})
    for tower in (config.model.vision, config.model.llm):
        tower.num_layers = 2
    config.model.scan_unroll = 2
    config.model.vocab_impl = "plain"
    config.train.jit = False
    config.train.num_steps = 2
    config.train.batch_size = 2
    config.train.log_every = 1
    config.train.validate_every = 2
    config.train.validation_sequences = 2
    config.train.checkpoint_every = 2
    return config
