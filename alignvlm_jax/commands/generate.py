"""`generate`: answers questions about an image or a page of a PDF, or with no image as the
language model does; without a question it reads the page.

The answers alone go to standard output.
"""

import argparse

from alignvlm_jax import storage
from alignvlm_jax.commands import usage
from alignvlm_jax.errors import UsageError
from alignvlm_jax.flag_types import positive


def main(argv: list[str]) -> None:
    args = _parse(argv)
    usage.check_run(args.checkpoint)
    if args.image:
        usage.check_image(args.image, args.page)
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.commands.work import generate

    generate.run(args)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = usage.parser("generate", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=storage.path,
        required=True,
        help="workdir, one of its checkpoints/STEP, or what `convert --export` wrote",
    )
    parser.add_argument(
        "--image",
        type=storage.path,
        help="a PNG, JPEG, ... or PDF file; without one the language model answers",
    )
    parser.add_argument("--page", type=int, default=1, help="page of a PDF, from 1")
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        help='for instance "What is the total?"; given again, several are answered, in order; '
        "without one the page is read, however many text lines it has",
    )
    parser.add_argument(
        "--max_new_tokens", type=positive, help="longest answer; default: that of the config"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="tokens are drawn, from logits divided by it; default 0: the likeliest of each step",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="drawn from the likeliest that have this probability together; default: all",
    )
    parser.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1: tokens that stand in the prompt or answer become less likely; default 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default 0")
    parser.add_argument(
        "--data", help="folder with the tokenizer, for checkpoints of before these held it"
    )
    args = parser.parse_args(argv)
    if not all(question.strip() for question in args.question):
        raise UsageError("--question is empty")
    if not args.image and not args.question:
        raise UsageError("there is neither --question nor --image: one of them is needed")
    if not args.question:
        flags = ("--temperature", "--top_p", "--repetition_penalty", "--seed")
        parser.check_used(argv, flags, "needs --question=TEXT: what is read is the likeliest")
    if not args.image:
        parser.check_used(argv, ("--page",), "needs --image=FILE")
    if args.temperature == 0:
        parser.check_used(argv, ("--top_p", "--seed"), "needs --temperature above 0")
    return args
