"""The demonstration: a model of a million parameters learns to read documents on a laptop.

The documents are rendered forms, receipts and tables.

    stage0_lines  the language model alone learns to copy and to look up, from the text of small
                  pages laid out on the patch grid. It stands in for a pretrained LLM, which has
                  learnt this already. Pages of two lines come first: what they teach in a minute
                  takes several on whole pages
    stage0_pages  the same on whole pages
    stage1        alignment: vision encoder and connector learn from patch labels what patches
                  show. The language model is not run, so that a step costs a third
    stage2        the whole model transcribes whole pages and answers questions about them
    stage3        answers only; the vision encoder is frozen

`--config=demo:mlp` is the same with the MLP connector, and likewise for all of
`models.connectors`. What cannot learn from patch labels is aligned by the whole model, which
transcribes small pages.
"""

import ml_collections

from alignvlm_jax import config as config_lib
from alignvlm_jax import presets

SMALL_PAGES = {"split": "train_small", "validation_split": "validation_small", "max_tiles": 1}
ANSWER_AND_TRANSCRIBE = {"answer_and_transcribe": 1.0}
DATA = "data/demo"
"""The folder that `prepare --format=documents` writes."""
SPLITS = ("seen_fonts", "unseen_layouts", "unseen_fonts", "unseen_fonts_and_layouts")
"""The splits that `prepare --format=documents` holds out for evaluation: fonts and layouts that
training has, or has none of, in each combination."""


BY_ANSWERS_RATE = 4e-3
"""Learning rate of stage 1 where the whole model learns by answers."""


def get_config(connector: str = "align") -> ml_collections.ConfigDict:
    """Returns the stages of the demonstration, with a connector of this name."""
    config = config_lib.default_config_dict()
    config.name = "demo"
    config_lib.set_preset(config.model.vision, presets.VISION["tiny"])
    config_lib.set_preset(config.model.llm, presets.LLM["tiny"])
    config.model.connector.name = connector
    set_connectors(config.model.connectors)
    # The id of <image> in the tokenizer that `prepare --format=documents` trains.
    config.model.image_token_id = 4
    config.model.scan_unroll = 3
    config.data.dir = DATA
    config.data.seq_len = 160
    config.data.max_tiles = 2
    config.data.tasks = ANSWER_AND_TRANSCRIBE
    # All text of its small pages can be read, and any of it in a patch counts in full.
    config.data.update(full_cover=0.125, min_token_height=0.0, min_contrast=0)
    # A patch shows up to two letters: without a slope their order would not show in its label.
    config.data.label_slope = 0.6
    # Small batches and many steps: what the model learns here depends on the number of steps.
    config.train.batch_size = 16
    config.train.validate_every = 400
    # Half of the steps that AdamW takes here.
    config.optim.name = "muon"
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 50
    config.eval.splits = SPLITS
    config.eval.num_questions = 300
    # The model reads the page's own tokens in the place of visual ones (oracle visual tokens).
    language_model = {"visual_source": "oracle", "trainable": ("llm/.*",)}
    config.stages = ml_collections.ConfigDict(
        {
            "stage0_lines": {
                "data": {**SMALL_PAGES, "seq_len": 96},
                "train": {"num_steps": 1000, **language_model},
                "optim": {"learning_rate": 4e-3},
            },
            "stage0_pages": {"train": {"num_steps": 600, **language_model}},
            "stage1": _alignment(connector),
            "stage2": {
                "data": {"seq_len": 160, "tasks": {"transcribe": 0.4, "answer": 0.6}},
                "train": {"num_steps": 1300, "generate_every": 400},
                "optim": {"learning_rate": 3e-3},
            },
            "stage3": {
                "data": {"seq_len": 136, "tasks": {"answer": 1.0}},
                "train": {
                    "num_steps": 400,
                    "trainable": ("connector/.*", "llm/.*"),
                    "generate_every": 200,
                },
                "optim": {"learning_rate": 1e-3},
            },
        }
    )
    return config


def _alignment(connector: str) -> dict:
    """Returns stage 1."""
    # Only the LLM has been trained so far; all else is initialised here.
    load = {"load": ("llm/.*",)}
    if config_lib.connector_class(connector).has_patch_loss():
        patches = {"answer_weight": 0.0, "trainable": ("vision/.*", "connector/.*")}
        return {
            "train": {"num_steps": 3500, **load, **patches},
            "optim": {"learning_rate": 8e-3},
        }
    return {
        "data": {**SMALL_PAGES, "seq_len": 88, "tasks": {"transcribe": 1.0}},
        "train": {"num_steps": 2000, **load},
        "optim": {"learning_rate": BY_ANSWERS_RATE},
    }


def by_answers(base: str) -> dict[str, object]:
    """Returns what changes stage 1 so that it learns by answers, as what has no patch loss must:
    for sweeps, in which all runs are to learn alike. Nothing for a `base` other than this file."""
    if base != "demo.py":
        return {}
    return {
        "stages.stage1.train.answer_weight": 1.0,
        "stages.stage1.optim.learning_rate": BY_ANSWERS_RATE,
    }


def set_connectors(connectors: ml_collections.ConfigDict) -> None:
    """Sets the sizes of all connectors for tiles of 2 x 16 patches.

    Sweeps then change only the name of the connector. As in the released models, the visual
    vocabulary is as large as the LLM's, and the H-Reducer makes a quarter of the patches. No other
    connector makes fewer, because a patch here shows two letters.
    """
    connectors.perceiver.num_latents = 16
    connectors.perceiver.num_layers = 3
    connectors.ovis.visual_vocab_size = 128
    connectors.h_reducer.merged_columns = 4
    connectors.c_abstractor.pooled_rows = 2
    connectors.c_abstractor.pooled_columns = 8
    connectors.c_abstractor.num_blocks = 2
