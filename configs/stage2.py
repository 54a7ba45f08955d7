"""The paper's stage 2, documents: trains the whole model on BigDocs' 7.5 M records, one epoch.

`--config=stage2:llama32_1b` (or llama32_3b, llama31_8b). Start from stage 1:
--config.init_from=runs/stage1
"""

import ml_collections

from alignvlm_jax.configs import paper

STAGE = paper.Stage(
    name="stage2",
    num_records=7_500_000,
    epochs=1,
    text_length=2048,
    seq_len=32 * paper.BLOCK,
    records_per_sequence=2.37,
    batch_size=paper.by_llm(512, 256, 256),
    learning_rate=paper.by_llm(5e-5, 5e-5, 1e-5),
)


def get_config(llm: str = "llama32_1b") -> ml_collections.ConfigDict:
    """Returns the stage with one of `paper.LLMS`."""
    return paper.make_config(STAGE, llm)
