"""`generate`: answers a question about an image or a page of a PDF. The answer alone goes to standard output."""

import argparse
import sys
from pathlib import Path

from alignvlm_jax.data import images, pipeline, rows
from alignvlm_jax.eval import loading


def main(argv: list[str]) -> None:
    args = _parse(argv)
    # Whatever can be wrong with the input is found before the model is loaded.
    page = images.load_page(args.image, args.page)
    config = loading.load_config(args.checkpoint, args.data)
    rows.build_prompt(page, args.question, config, pipeline.load_tokenizer(config))
    loaded = loading.load(args.checkpoint, config)
    config = loaded.config
    prompt = rows.build_prompt(page, args.question, config, loaded.tokenizer)
    num_tiles = (prompt["tokens"] == config.model.image_token_id).sum() // config.model.slots_per_tile
    print(f"{loaded.path}: {page.width} x {page.height} pixels, {num_tiles} tiles", file=sys.stderr)
    # Every device that rows are spread over needs one.
    batch = pipeline.stack([prompt] * loaded.batch_ways)
    tokens_BT = loaded.sampler().generate(batch, config.eval.max_new_tokens)
    print(loaded.tokenizer.decode(tokens_BT[0]))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alignvlm_jax generate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="workdir, or one of its checkpoints/STEP")
    parser.add_argument("--image", type=Path, required=True, help="a PNG, JPEG, ... or PDF file")
    parser.add_argument("--page", type=int, default=1, help="page of a PDF, from 1")
    parser.add_argument("--question", required=True, help='for instance "What is the total?"')
    parser.add_argument("--data", help="folder with the tokenizer.model; default: the one trained on")
    return parser.parse_args(argv)
