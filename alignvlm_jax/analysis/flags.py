"""The flags of each analysis. Apart from what measures: a misspelt one should not wait for jax."""

import argparse

from alignvlm_jax import flag_types

KINDS_OF_NOISE = ("features", "pixels", "layout")


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of an analysis that generates answers to questions.

    `base.check_splits` and `base.with_num_questions` fill in their defaults from the model's
    config.
    """
    parser.add_argument(
        "--split", help="whose questions are asked; default: the first of the config"
    )
    parser.add_argument("--num_questions", type=flag_types.positive, help="default: the config's")


def add_noise_on_features(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of noise on the vision features."""
    _add_perturbation(parser)
    _add_sigmas(parser, [3.0], "in the unit of the features; default: 3")
    parser.add_argument(
        "--relative_sigmas",
        type=flag_types.sizes,
        default=[0.25, 0.5, 1.0, 2.0, 4.0],
        help="in units of the features' standard deviation; default: 0.25,0.5,1,2,4",
    )


def add_noise_on_pixels(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of noise on the page's pixels."""
    _add_perturbation(parser)
    unit = "where black is 0 and white is 1"
    _add_sigmas(parser, [0.05, 0.1, 0.2, 0.4], f"{unit}; default: 0.05,0.1,0.2,0.4")


def add_moved_content(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of content that is moved."""
    _add_perturbation(parser)
    parser.add_argument(
        "--shifts",
        type=flag_types.positives,
        default=[],
        help="most pixels of the page; default: none",
    )
    parser.add_argument(
        "--relative_shifts",
        type=flag_types.sizes,
        default=[0.125, 0.25, 0.5, 1.0],
        help="most, in units of a patch's shorter side on the page; default: 0.125,0.25,0.5,1",
    )


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the usage of the vocabulary."""
    add_questions(parser)
    _add_usage(parser)


def add_words(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the few words that each patch keeps."""
    add_questions(parser)
    _add_usage(parser)
    parser.add_argument(
        "--top_k",
        type=flag_types.positives,
        default=[1, 2, 4, 8],
        help="words that a patch keeps; default: 1,2,4,8",
    )
    _add_seed(parser)


def add_pca(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the coverage of the space of text embeddings."""
    _add_usage(parser)
    _add_seed(parser)


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the text states that visual tokens are nearest to."""
    _add_pages(parser)
    parser.add_argument(
        "--num_states",
        type=flag_types.positive,
        default=4096,
        help="most tokens of the text whose states are held, after every layer, and most visual "
        "tokens; default: 4096",
    )
    _add_seed(parser)


def add_separation(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the distances between visual tokens of letters."""
    _add_pages(parser)
    _add_seed(parser)


def add_cost(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the cost of connectors."""
    parser.add_argument(
        "--connectors",
        type=flag_types.names,
        default=[],
        help="their names, separated by commas, all held in memory together; default: all that fit",
    )
    parser.add_argument(
        "--repeats", type=flag_types.positive, default=5, help="of each timing; default: 5"
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of an analysis that draws numbers."""
    # numpy takes none below 0, and says so only once the model is loaded.
    parser.add_argument("--seed", type=flag_types.not_negative, default=0)


def _add_perturbation(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that all perturbations have."""
    parser.add_argument(
        "--kind",
        choices=KINDS_OF_NOISE,
        default=KINDS_OF_NOISE[0],
        help="where the perturbation enters: noise on the vision features (default) or on the "
        "page's pixels, or content that is moved. Each has a --help of its own",
    )
    add_questions(parser)
    _add_seed(parser)


def _add_sigmas(parser: argparse.ArgumentParser, default: list[float], text: str) -> None:
    """Adds the flags of Gaussian noise, through which visual tokens are compared."""
    parser.add_argument(
        "--num_pages",
        type=flag_types.positive,
        default=32,
        help="whose visual tokens are compared; default: 32",
    )
    parser.add_argument("--sigmas", type=flag_types.sizes, default=default, help=text)


def _add_usage(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the pages whose patches choose tokens, and for the threshold."""
    _add_pages(parser)
    parser.add_argument(
        "--threshold",
        type=flag_types.probability,
        default=1e-6,
        help="a word is kept above it; default: 1e-6",
    )


def _add_pages(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the pages whose patches are measured."""
    parser.add_argument(
        "--pages", help="split whose pages are read; default: the config's validation split"
    )
    parser.add_argument(
        "--num_pages", type=flag_types.positive, default=100, help="of it; default: 100"
    )
