"""The flags of each analysis of `inspect`."""

import argparse

from alignvlm_jax.commands.config_flag import positive
from alignvlm_jax.models import connectors

KINDS = ("features", "pixels", "layout")
"""Of noise. Results of the first are those without a kind in their name."""


def _names(text: str) -> list[str]:
    """Separated by commas."""
    return text.split(",")


def _sizes(text: str) -> list[float]:
    """Numbers above 0, separated by commas; there may be none."""
    try:
        values = [float(part) for part in text.split(",") if part]
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"{text} is not made of numbers with commas between them"
        ) from err
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(
            f"{text} has a size that is not above 0 (0 is always measured)"
        )
    return values


def _pixels(text: str) -> list[int]:
    """Whole numbers above 0, separated by commas; there may be none."""
    return [positive(part) for part in text.split(",") if part]


def _threshold(text: str) -> float:
    """A probability."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability: from 0 to below 1")
    return float(text)


def _add_question_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split", help="whose questions are asked; default: the first of the config"
    )
    parser.add_argument("--num_questions", type=positive, help="default: the config's")


def _add_noise_flags(parser: argparse.ArgumentParser) -> None:
    """Those of every kind."""
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="where the disturbance enters: noise on the vision features (default) or on the "
        "page's pixels, or content that is moved. Each has a --help of its own",
    )
    _add_question_flags(parser)
    parser.add_argument("--seed", type=int, default=0)


def _add_compared_pages_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num_pages",
        type=positive,
        default=32,
        help="whose visual tokens are compared; default: 32",
    )


def add_feature_noise(parser: argparse.ArgumentParser) -> None:
    _add_noise_flags(parser)
    _add_compared_pages_flag(parser)
    parser.add_argument(
        "--sigmas", type=_sizes, default=[3.0], help="in the unit of the features; default: 3"
    )
    parser.add_argument(
        "--relative_sigmas",
        type=_sizes,
        default=[0.25, 0.5, 1.0, 2.0, 4.0],
        help="in units of the features' standard deviation; default: 0.25,0.5,1,2,4",
    )


def add_pixel_noise(parser: argparse.ArgumentParser) -> None:
    _add_noise_flags(parser)
    _add_compared_pages_flag(parser)
    parser.add_argument(
        "--sigmas",
        type=_sizes,
        default=[0.05, 0.1, 0.2, 0.4],
        help="where black is 0 and white is 1; default: 0.05,0.1,0.2,0.4",
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    _add_noise_flags(parser)
    parser.add_argument(
        "--shifts", type=_pixels, default=[], help="most pixels of the page; default: none"
    )
    parser.add_argument(
        "--relative_shifts",
        type=_sizes,
        default=[0.125, 0.25, 0.5, 1.0],
        help="most, in units of a patch's shorter side on the page; default: 0.125,0.25,0.5,1",
    )


def _add_word_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold", type=_threshold, default=1e-6, help="a word is kept above it; default: 1e-6"
    )
    parser.add_argument(
        "--pages", help="split whose pages choose the words; default: the config's validation split"
    )
    parser.add_argument("--num_pages", type=positive, default=100, help="of it; default: 100")


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    _add_question_flags(parser)
    _add_word_flags(parser)


def add_pca(parser: argparse.ArgumentParser) -> None:
    _add_word_flags(parser)
    parser.add_argument("--seed", type=int, default=0)


def add_cost(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(connectors.REGISTRY)
    parser.add_argument(
        "--connectors", type=_names, default=[], help=f"of {names}; default: all that fit"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="of each timing; default: 5")
