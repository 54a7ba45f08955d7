"""SmolLM2-135M-Instruct and DINOv2 ViT-S/14, fine-tuned on real pages that `make data` prepares, or
on your own; `--config=documents:DIR` is the same from another checkpoint.

    align   the whole model is trained to transcribe pages, which aligns the connector
    answer  the vision encoder is frozen; the model transcribes pages and answers questions about
            their tables

It takes data with words, with questions, or with both: a page whose words are not known is asked
its questions in both stages, and one without questions is transcribed.

A page has an overview and six tiles: of 224 pixels, 1,792 visual tokens, beside 740 of its text on
average. Sequences have room for three such pages in the first stage and for five in the second, and
their lengths follow the tokens that a tile has. On Debian's manual they are full to 97 % and 99 %.
They may exceed the length that the LLM was trained on, since positions begin anew with every
record. For an accelerator: on a laptop a step takes minutes.
"""

import ml_collections

from alignvlm_jax.configs import finetune


def get_config(folder: str = "weights/smollm2") -> ml_collections.ConfigDict:
    """Returns the stages that start from the checkpoint in `folder`, on the data of `make data`."""
    config = finetune.get_config(folder)
    config.name = "documents"
    config.model.dtype = "bfloat16"
    config.data.dir = "data/debian"
    config.data.packing = "offline"
    config.data.use_overview = True
    config.data.record_tiles = 7
    config.data.max_tiles = 21
    config.data.seq_len = finetune.packed_length(folder, 21, 2_048)
    # A record is asked a task that it has text for: next to no weight leaves `answer` to those
    # without words.
    config.stages.align.data.tasks = {"transcribe": 1.0, "answer": 1e-6}
    config.stages.answer.data = {
        "tasks": {"answer_and_transcribe": 1.0},
        "max_tiles": 35,
        "seq_len": finetune.packed_length(folder, 35, 2_560),
    }
    return config
