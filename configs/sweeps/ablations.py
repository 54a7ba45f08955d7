"""An ablation of ALIGN: changes one of its components at a time, with three seeds of each.

configs/sweeps/ablations.py                        on the demonstration
configs/sweeps/ablations.py:stage2.py:llama32_1b   on a stage of the paper
"""

from collections.abc import Iterator

from alignvlm_jax.configs.sweeps.compare import ALIGN, SEEDS

from alignvlm_jax.configs import demo

CHANGES = {"align": {}, **ALIGN, "without_patch_loss": {"train.patch_token_weight": 0.0}}


def sweep(base: str = "demo.py") -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields (name, config, changed fields) of every run; `base` is a config file's name."""
    # As the row without the patch loss has to, all others learn by answers throughout.
    common = demo.by_answers(base)
    for change, fields in CHANGES.items():
        for seed in SEEDS:
            changed = {**fields, "seed": seed, **common}
            yield f"align/{change}_seed{seed}", f"configs/{base}", changed
