"""A config for debugging: two layers in each tower, one device, and no step is compiled.

    python -m alignvlm_jax prepare --format=documents --out=data/demo  # or a few:
    python -m alignvlm_jax prepare --format=documents --out=data/few --num_train=200 --num_eval=16
    python -m alignvlm_jax train --config=debug --workdir=runs/debug --debug

With `train.jit` off every operation of a step runs by itself, so that `print(x_BTD)` shows numbers,
and `breakpoint()` in `models/` or `train/step.py` stops at them; layers are a Python loop, since a
`lax.scan` that is not compiled is one. What one meets there:

- Before the first step parameters are planned by their shapes alone: at the first few stops an
  array is a tracer without values. Go on (`c`) until the line `stage ...: steps 1 to 2` has come.
- In a training step arrays belong to a gradient: `print` shows their values as `primal`, and
  `jax.lax.stop_gradient(x)` is a plain array, for float() and NumPy. In validation all are plain.
- Each operation is compiled by itself when it is first met: most of a minute before the first step
  ends, and then seconds a step.
- The run is over after two steps; to run it again, take another --workdir, or remove this one.

It learns nothing to speak of; `--config=demo` does. On a machine with several devices, show it
one of them: JAX_PLATFORMS=cpu, or CUDA_VISIBLE_DEVICES=0.
"""

import ml_collections

from alignvlm_jax.configs import demo


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
