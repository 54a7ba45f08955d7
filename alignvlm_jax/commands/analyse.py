"""`inspect --analysis`: what a trained model makes of the pages of a split."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from alignvlm_jax import files
from alignvlm_jax.commands.arguments import positive
from alignvlm_jax.config import Config
from alignvlm_jax.data import sources
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import analysis, analysis_tables, cost, loading, looking, noise, noise_figure, pca, vocabulary
from alignvlm_jax.eval.loading import Loaded
from alignvlm_jax.models import connectors

NEED_WORDS = ("vocabulary", "pca")
"""Analyses of connectors with a distribution over words."""

DEFAULT_KIND = "features"
"""Of noise; its results are those without a kind in their name."""


class Analysis(NamedTuple):
    """An analysis: its `help`, its flags, what it measures of a model, how that is printed, and
    the picture of results by name, if there is one."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[Loaded, argparse.Namespace], Mapping[str, Any]]
    show: Callable[[Console, Mapping[str, Any]], None]
    picture: Callable[[Mapping[str, Mapping[str, Any]]], bytes] | None = None


def is_asked(argv: list[str]) -> bool:
    """Returns whether the flags of `inspect` name one of `ANALYSES`."""
    return _peek(argv) in ANALYSES


def main(argv: list[str]) -> None:
    """Prints the results as a table and writes analysis/NAME.json in the workdir."""
    args = _parse(argv)
    config = loading.load_config(args.checkpoint, args.data)
    _check(config, args)
    loaded = loading.load(args.checkpoint, config)
    if "num_questions" in args:
        args.num_questions = args.num_questions or loaded.config.eval.num_questions
        asked = dataclasses.replace(loaded.config.eval, num_questions=args.num_questions)
        loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eval=asked))
    chosen = _chosen(argv)
    try:
        found = chosen.measure(loaded, args)
    except KeyboardInterrupt as err:
        raise UserError("stopped; the same command goes on, and asks no question again") from err
    settings = {name: value for name, value in vars(args).items() if name not in ("checkpoint", "analysis", "data")}
    kind = getattr(args, "kind", DEFAULT_KIND)
    name = args.analysis if kind == DEFAULT_KIND else f"{args.analysis}_{kind}"
    path = analysis.write(loaded, name, settings | {"data": loaded.config.data.dir}, found)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{loaded.path}: connector {loaded.config.model.connector.name}", markup=False)
    chosen.show(console, found)
    console.print(f"Written: {path}", markup=False)
    if chosen.picture is not None:
        path = path.with_suffix(".png")
        files.write_whole(path, chosen.picture({loaded.config.model.connector.name: found}))
        console.print(f"Written: {path}", markup=False)


def _check(config: Config, args: argparse.Namespace) -> None:
    """Fills in the splits that the config names. What can be wrong should not wait for the model."""
    for flag, default in (("split", config.eval.splits[0]), ("pages", config.data.validation_split)):
        if flag in args:
            setattr(args, flag, getattr(args, flag) or default)
            sources.RecordSource(config.data.dir, getattr(args, flag))
    if args.analysis in NEED_WORDS:
        looking.check(config)
    for name in getattr(args, "connectors", ()):
        connectors.get(name)
        cost.with_connector(config, name)


def _chosen(argv: list[str]) -> Analysis:
    """The analysis that the flags name. A kind of noise has flags of its own."""
    name = _peek(argv)
    if name != "noise":
        return ANALYSES[name]
    return NOISES.get(_peek(argv, "--kind"), ANALYSES[name])  # Of a misspelt kind argparse will tell.


def _peek(argv: list[str], flag: str = "--analysis") -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


def _parse(argv: list[str]) -> argparse.Namespace:
    """Flags of all analyses, and those of the one that is asked for: another's are wrong usage."""
    chosen = _chosen(argv)
    parser = argparse.ArgumentParser(
        prog="python -m alignvlm_jax inspect", description=f"Analysis: {chosen.help}.", allow_abbrev=False
    )
    parser.add_argument("--analysis", choices=ANALYSES)
    parser.add_argument("--checkpoint", type=Path, help="workdir, or one of its checkpoints/STEP")
    parser.add_argument("--data", help="folder that `prepare` wrote; default: the one trained on")
    chosen.add_flags(parser)
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        parser.error(f"--analysis={args.analysis} needs --checkpoint=DIR")
    return args


def _names(text: str) -> list[str]:
    """Separated by commas."""
    return text.split(",")


def _sizes(text: str) -> list[float]:
    """Numbers above 0, separated by commas; there may be none."""
    values = [float(part) for part in text.split(",") if part]
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text} has a size that is not above 0 (0 is always measured)")
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
    parser.add_argument("--split", help="whose questions are asked; default: the first of the config")
    parser.add_argument("--num_questions", type=positive, help="default: the config's")


def _add_noise_flags(parser: argparse.ArgumentParser) -> None:
    """Those of every kind."""
    kinds = "; ".join(f"{name}: {one.help}" for name, one in NOISES.items())
    parser.add_argument(
        "--kind", choices=NOISES, default=DEFAULT_KIND, help=f"{kinds}. Each has a --help; default: {DEFAULT_KIND}"
    )
    _add_question_flags(parser)
    parser.add_argument("--seed", type=int, default=0)


def _add_feature_noise_flags(parser: argparse.ArgumentParser) -> None:
    _add_noise_flags(parser)
    _add_compared_pages_flag(parser)
    parser.add_argument("--sigmas", type=_sizes, default=[3.0], help="in the unit of the features; default: 3")
    parser.add_argument(
        "--relative_sigmas",
        type=_sizes,
        default=[0.25, 0.5, 1.0, 2.0, 4.0],
        help="in units of the features' standard deviation; default: 0.25,0.5,1,2,4",
    )


def _add_pixel_noise_flags(parser: argparse.ArgumentParser) -> None:
    _add_noise_flags(parser)
    _add_compared_pages_flag(parser)
    parser.add_argument(
        "--sigmas",
        type=_sizes,
        default=[0.05, 0.1, 0.2, 0.4],
        help="where black is 0 and white is 1; default: 0.05,0.1,0.2,0.4",
    )


def _add_compared_pages_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_pages", type=positive, default=32, help="whose visual tokens are compared; default: 32")


def _add_layout_flags(parser: argparse.ArgumentParser) -> None:
    _add_noise_flags(parser)
    parser.add_argument("--shifts", type=_pixels, default=[], help="most pixels of the page; default: none")
    parser.add_argument(
        "--relative_shifts",
        type=_sizes,
        default=[0.125, 0.25, 0.5, 1.0],
        help="most, in units of a patch's shorter side on the page; default: 0.125,0.25,0.5,1",
    )


def _add_word_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=_threshold, default=1e-6, help="a word is kept above it; default: 1e-6")
    parser.add_argument("--pages", help="split whose pages choose the words; default: the config's validation split")
    parser.add_argument("--num_pages", type=positive, default=100, help="of it; default: 100")


def _add_vocabulary_flags(parser: argparse.ArgumentParser) -> None:
    _add_question_flags(parser)
    _add_word_flags(parser)


def _add_pca_flags(parser: argparse.ArgumentParser) -> None:
    _add_word_flags(parser)
    parser.add_argument("--seed", type=int, default=0)


def _add_cost_flags(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(connectors.REGISTRY)
    parser.add_argument("--connectors", type=_names, default=[], help=f"of {names}; default: all that fit")
    parser.add_argument("--repeats", type=positive, default=5, help="of each timing; default: 5")


def _measure_feature_noise(loaded: Loaded, args: argparse.Namespace) -> Mapping[str, Any]:
    return noise.measure(loaded, args.split, args.sigmas, args.relative_sigmas, args.num_pages, args.seed)


def _measure_pixel_noise(loaded: Loaded, args: argparse.Namespace) -> Mapping[str, Any]:
    return noise.measure_pixels(loaded, args.split, args.sigmas, args.num_pages, args.seed)


def _measure_layout(loaded: Loaded, args: argparse.Namespace) -> Mapping[str, Any]:
    return noise.measure_layout(loaded, args.split, args.shifts, args.relative_shifts, args.seed)


def _measure_vocabulary(loaded: Loaded, args: argparse.Namespace) -> Mapping[str, Any]:
    return vocabulary.measure(loaded, args.split, args.pages, args.num_pages, args.threshold)


def _measure_cost(loaded: Loaded, args: argparse.Namespace) -> Mapping[str, Any]:
    return cost.measure(loaded, args.connectors, args.repeats)


def _measure_pca(loaded: Loaded, args: argparse.Namespace) -> Mapping[str, Any]:
    return pca.measure(loaded, args.pages, args.num_pages, args.threshold, args.seed)


NOISES = {
    DEFAULT_KIND: Analysis(
        "scores and movement of visual tokens under Gaussian noise on the vision features",
        _add_feature_noise_flags,
        _measure_feature_noise,
        analysis_tables.show_noise,
        noise_figure.picture,
    ),
    "pixels": Analysis(
        "the same under Gaussian noise on the page's pixels",
        _add_pixel_noise_flags,
        _measure_pixel_noise,
        analysis_tables.show_noise,
        noise_figure.picture,
    ),
    "layout": Analysis(
        "scores where the page's content is moved",
        _add_layout_flags,
        _measure_layout,
        analysis_tables.show_noise,
        noise_figure.picture,
    ),
}
"""Kinds of noise."""

ANALYSES = {
    "noise": NOISES[DEFAULT_KIND],
    "vocabulary": Analysis(
        "which words ALIGN's patches use, and the scores with these alone",
        _add_vocabulary_flags,
        _measure_vocabulary,
        analysis_tables.show_vocabulary,
    ),
    "pca": Analysis(
        "how well the words that ALIGN's patches use cover the space of text embeddings",
        _add_pca_flags,
        _measure_pca,
        analysis_tables.show_pca,
    ),
    "cost": Analysis(
        "parameters, FLOPs, memory and time of connectors beside the checkpoint's encoder and LLM",
        _add_cost_flags,
        _measure_cost,
        analysis_tables.show_cost,
    ),
}
