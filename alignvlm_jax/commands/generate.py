"""`generate`: answers a question about an image or a page of a PDF, or with no image as the language model does.

The answer alone goes to standard output.
"""

import argparse
import sys
from pathlib import Path

from alignvlm_jax.commands.arguments import positive
from alignvlm_jax.data import images, pipeline, rows
from alignvlm_jax.eval import loading


def main(argv: list[str]) -> None:
    args = _parse(argv)
    # Whatever can be wrong with the input is found before the model is loaded.
    page = images.load_page(args.image, args.page) if args.image else None
    config = loading.load_config(args.checkpoint, args.data)
    rows.build_prompt(page, args.question, config, pipeline.load_tokenizer(config))
    loaded = loading.load(args.checkpoint, config)
    config = loaded.config
    prompt = rows.trim_prompt(rows.build_prompt(page, args.question, config, loaded.tokenizer), config)
    seen = f"{page.width} x {page.height} pixels, {len(prompt['tiles'])} tiles" if page else "no image"
    print(f"{loaded.path}: {seen}", file=sys.stderr)
    # Every device that rows are spread over needs one.
    batch = pipeline.stack([prompt] * loaded.batch_ways)
    tokens_BT = loaded.sampler().generate(batch, args.max_new_tokens or config.eval.max_new_tokens)
    print(loaded.tokenizer.decode(tokens_BT[0]))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alignvlm_jax generate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="workdir, or one of its checkpoints/STEP")
    parser.add_argument(
        "--image", type=Path, help="a PNG, JPEG, ... or PDF file; without one the language model answers"
    )
    parser.add_argument("--page", type=int, default=1, help="page of a PDF, from 1")
    parser.add_argument("--question", required=True, help='for instance "What is the total?"')
    parser.add_argument("--max_new_tokens", type=positive, help="longest answer; default: that of the config")
    parser.add_argument("--data", help="folder with the tokenizer.model; default: the one trained on")
    return parser.parse_args(argv)
