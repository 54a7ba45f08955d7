"""SmolLM2-135M-Instruct and DINOv2 ViT-S/14 on real pages: `make data` puts both where this looks
for them.

    align   all is trained to transcribe pages, and the connector finds its place
    answer  the vision encoder is frozen; pages are transcribed and asked about their tables

A page has an overview and six tiles of 224 pixels: 1,792 visual tokens, beside 740 of its text in
the mean. The length of rows was chosen for Debian's manual: two or three pages share one, or four
or five, and 97 % and 99 % of it are in use. It may be more than what the LLM was trained on, as
positions begin anew with every record. For an accelerator: on a laptop a step takes minutes.
"""

import ml_collections

from configs import finetune


def get_config(folder: str = "weights/smollm2") -> ml_collections.ConfigDict:
    """Returns the stages that start from what `make weights` wrote, on what `make data` wrote."""
    config = finetune.get_config(folder)
    config.name = "documents"
    config.model.dtype = "bfloat16"
    config.data.dir = "data/debian"
    config.data.packing = "offline"
    config.data.use_overview = True
    config.data.record_tiles = 7
    config.data.max_tiles = 21
    config.data.seq_len = 7_424
    config.stages.answer.data = {
        "tasks": {"answer_and_transcribe": 1.0},
        "max_tiles": 35,
        "seq_len": 11_520,
    }
    return config
