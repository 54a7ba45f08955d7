"""A small reader of real pages: SmolLM2-135M, ALIGN, and a vision encoder of four million weights.

`make reader` trains it on lines cut out of real manuals, and on lines and tables that are drawn
(`prepare --format=crops`), in two hours on two cores.

    stage1  the language model's attention learns to read what a perfect connector would hand on,
            the letters of a line one after another (oracle visual tokens); no image is encoded
    stage2  vision encoder and connector learn from patch labels which characters patches show; the
            language model is not run
    stage3  both are joined: vision encoder, connector and that attention learn from pixels

A page is cut by its text lines. Each is scaled to a height of 16 pixels, at which a patch of 16 x 5
pixels shows a letter of text of any size, and blank patches do not reach the language model. A
tenth of the records have no image, so that it goes on writing text as before.

`--config=reader:gpu` is the same recipe for one accelerator, with larger batches and more steps;
`--config=reader:cpu:FOLDER` starts from other weights.
"""

import ml_collections

from alignvlm_jax import config as config_lib
from alignvlm_jax import presets
from alignvlm_jax.configs import finetune

WEIGHTS = "weights/smollm2"
"""The folder that `make weights` writes, of which the language model and its tokenizer are used."""
DATA = "data/reader"
"""The folder that `prepare --format=crops` writes."""
KINDS = ("natural", "shuffled", "random", "tables")
SPLITS = ("crops", *KINDS, *(f"{kind}_unseen_faces" for kind in KINDS))
"""The splits that `prepare --format=crops` makes of manuals that no training page is of."""


def get_config(hardware_and_weights: str = "cpu") -> ml_collections.ConfigDict:
    """Returns the stages for "cpu", two cores, or for "gpu", one accelerator; after a colon from
    the weights in a folder, as "cpu:weights/other"."""
    hardware, _, weights = hardware_and_weights.partition(":")
    if hardware not in ("cpu", "gpu"):
        raise ValueError(f"reader:{hardware} is not known; there are reader:cpu and reader:gpu")
    is_large = hardware == "gpu"
    config = finetune.get_config(weights or WEIGHTS)
    config.name = "reader"
    config_lib.set_preset(config.model.vision, presets.VISION["lines"])
    # CPUs with instructions for it multiply twice as fast, too.
    config.model.dtype = "bfloat16"
    config.model.remat = "none"
    if not is_large:
        # A loop over layers copies what it saves of them, in bfloat16 for CPUs several times over.
        config.model.scan_unroll = config.model.llm.num_layers
    config.data.update(
        dir=DATA,
        tiling="lines",
        record_tiles=12,
        # The longest four in a sequence do not fit: room for them would cost all others.
        records_per_sequence=4,
        max_tiles=20,
        seq_len=1024,
        max_unsupervised=0.2,
        blank_contrast=24,
        label_unit="letter",
        # A letter is then copied from the patch that shows it, and a cell's row found by its
        # letters.
        text_unit="letter",
        # Where a patch shows two letters, the left one counts for more.
        label_slope=0.6,
        # All text of a line can be read, whatever its height on the page was.
        full_cover=0.125,
        min_token_height=0.0,
    )
    config.data.tasks = {"answer": 1.0}
    config.train.batch_size = 24 if is_large else 2
    config.train.validate_every = 600
    config.train.validation_sequences = 16
    config.optim.warmup_steps = 10
    config.eval.splits = SPLITS
    config.eval.num_questions = 300 if is_large else 50
    config.eval.batch_size = 50
    config.eval.max_new_tokens = 200
    config.stages = ml_collections.ConfigDict(
        {
            "stage1": {
                "train": {
                    "num_steps": 1000 if is_large else 240,
                    "load": ("llm/.*",),
                    "visual_source": "oracle",
                    # To copy is attention's task; what the MLPs know of language stays as it is.
                    "trainable": ("llm/.*/attn/.*",),
                },
                "optim": {"learning_rate": 3e-4},
            },
            "stage2": {
                # Text is not sent to the devices here.
                "data": {"records_per_sequence": 6, "max_tiles": 26, "seq_len": 2048},
                "train": {
                    "num_steps": 3000 if is_large else 2800,
                    "trainable": ("vision/.*", "connector/.*"),
                    "answer_weight": 0.0,
                    "sampled_entries": 1024,
                },
                # Half of the steps of AdamW; over a pretrained LLM its matmuls would cost more than
                # they save.
                "optim": {"name": "muon", "learning_rate": 8e-3, "warmup_steps": 50},
            },
            "stage3": {
                "train": {
                    "num_steps": 2000 if is_large else 130,
                    "trainable": ("vision/.*", "connector/.*", "llm/.*/attn/.*"),
                },
                "optim": {"learning_rate": 2e-4},
            },
        }
    )
    return config
