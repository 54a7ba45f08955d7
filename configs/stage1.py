"""The paper's stage 1, alignment: trains the whole model on 8.1 M pairs of CC-12M, one epoch.

`--config=stage1:llama32_1b` (or llama32_3b, llama31_8b). Start from published weights, as
`convert` leaves them: --config.init_from=weights/mine
--config.data.tokenizer=weights/mine/tokenizer
"""

import ml_collections

from alignvlm_jax.configs import paper

STAGE = paper.Stage(
    name="stage1",
    num_records=8_100_000,
    epochs=1,
    text_length=1024,
    seq_len=29 * paper.BLOCK,
    records_per_sequence=3.59,
    batch_size=paper.by_llm(512, 512, 512),
    learning_rate=paper.by_llm(1e-5, 1e-5, 1e-5),
)


def get_config(llm: str = "llama32_1b") -> ml_collections.ConfigDict:
    """Returns the stage with one of `paper.LLMS`."""
    return paper.make_config(STAGE, llm)
