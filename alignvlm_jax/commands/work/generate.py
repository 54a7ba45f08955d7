"""What `generate` does once its flags are read."""

import argparse
import dataclasses
import sys

from alignvlm_jax import logs
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.errors import counted
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.assistant import Assistant, reading_prompts
from alignvlm_jax.inference.decoding import Decoding


def run(args: argparse.Namespace) -> None:
    """Prints the answers to questions about an image, or about nothing where there is none."""
    names = [field.name for field in dataclasses.fields(Decoding)]
    decoding = {name: getattr(args, name) for name in names}
    # For what it raises.
    Decoding(**decoding)
    # Mistakes in the input are found before the model is loaded; the prompt is built only to see
    # whether it fits.
    config = loading.load_config(args.checkpoint, args.data)
    page = None
    if args.image:
        page = loading.load_page(args.checkpoint, args.image, args.page)
    tokenizer = loading.load_tokenizer(args.checkpoint, config.data, config.model)
    builder = ExampleBuilder.of(config, tokenizer)
    if args.question:
        shown = [builder.prompt(page, question) for question in args.question][:1]
    else:
        shown = reading_prompts(builder, page)
    loaded = loading.load(args.checkpoint, config)
    seen = "no image"
    if page:
        num_tiles = sum(map(builder.num_tiles, shown))
        seen = f"{page.width} x {page.height} pixels, {counted(num_tiles, 'tile')}"
    print(f"{loaded.path}: {seen}", file=sys.stderr)
    with loading.programs_kept(args.checkpoint):
        assistant = Assistant(loaded, warn=logs.say)
        if args.question:
            answers = assistant.answer(
                page, args.question, max_new_tokens=args.max_new_tokens, **decoding
            )
        else:
            answers = [assistant.read(page, max_new_tokens=args.max_new_tokens)]
    for question, answer in zip(args.question or [""], answers, strict=True):
        if len(answers) > 1:
            # Flushed, so that each stands above its answer.
            print(question, file=sys.stderr, flush=True)
        # A model that has nothing more to say may go on with line breaks.
        print(answer.rstrip(), flush=True)
        if not answer.strip():
            # Else a blank line is all that one sees.
            print("(an empty answer)", file=sys.stderr)
