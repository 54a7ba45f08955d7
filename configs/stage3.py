"""The paper's stage 3, questions: trains LLM and ALIGN on DocDownstream, with a frozen encoder.

It takes five epochs over 570 K records, the number in DocDownstream-1.0's README; the paper states
none.

`--config=stage3:llama32_1b` (or llama32_3b, llama31_8b). Start from stage 2:
--config.init_from=runs/stage2.
"""

import ml_collections

from alignvlm_jax.configs import paper

STAGE = paper.Stage(
    name="stage3",
    num_records=570_000,
    epochs=5,
    text_length=2048,
    seq_len=29 * paper.BLOCK,
    records_per_sequence=2.69,
    batch_size=paper.by_llm(512, 256, 256),
    learning_rate=paper.by_llm(5e-5, 5e-5, 1e-5),
    trainable=("connector/.*", "llm/.*"),
)


def get_config(llm: str = "llama32_1b") -> ml_collections.ConfigDict:
    """Returns the stage with one of `paper.LLMS`."""
    return paper.make_config(STAGE, llm)
