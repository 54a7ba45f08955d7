"""`inspect --analysis`: what a trained model makes of the pages of a split."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.console import Console

from alignvlm_jax import storage
from alignvlm_jax.analysis import base, cost, noise, pca, tables, vocabulary
from alignvlm_jax.commands import analysis_flags
from alignvlm_jax.config import Config
from alignvlm_jax.data import shards
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading, patch_tokens
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import connectors
from alignvlm_jax.parallel import compile_cache, distributed

NEED_WORDS = ("vocabulary", "pca")
"""Analyses of connectors with a distribution over words."""


class Analysis(NamedTuple):
    """An analysis: its `help`, its flags, what it measures of a model, and how that is printed and,
    with the name of the connector, pictured."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[Loaded, argparse.Namespace], Mapping[str, Any]]
    show: Callable[[Console, Mapping[str, Any]], None]
    picture: Callable[[str, Mapping[str, Any]], bytes]


def is_asked(argv: list[str]) -> bool:
    """Returns whether the flags of `inspect` name one of `ANALYSES`."""
    return _peek(argv) in ANALYSES


def main(argv: list[str]) -> None:
    """Prints the results as a table and writes analysis/NAME.json in the workdir."""
    args = _parse(argv)
    distributed.initialize(argv)
    config = loading.load_config(args.checkpoint, args.data)
    _check(config, args)
    loaded = loading.load(args.checkpoint, config)
    if "num_questions" in args:
        args.num_questions = args.num_questions or loaded.config.eval.num_questions
        asked = dataclasses.replace(loaded.config.eval, num_questions=args.num_questions)
        loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eval=asked))
    chosen = _chosen(argv)
    try:
        with compile_cache.kept_in(loading.workdir_of(args.checkpoint)):
            found = chosen.measure(loaded, args)
    except KeyboardInterrupt as err:
        raise UserError("stopped; the same command goes on, and asks no question again") from err
    if not distributed.is_main():
        return
    settings = {
        name: value
        for name, value in vars(args).items()
        if name not in ("checkpoint", "analysis", "data")
    }
    kind = getattr(args, "kind", analysis_flags.KINDS[0])
    name = args.analysis if kind == analysis_flags.KINDS[0] else f"{args.analysis}_{kind}"
    path = base.write(loaded, name, settings | {"data": loaded.config.data.dir}, found)
    console = Console(highlight=False, soft_wrap=True)
    connector = loaded.config.model.connector.name
    console.print(f"{loaded.path}: connector {connector}", markup=False)
    chosen.show(console, found)
    console.print(f"Written: {path}", markup=False)
    path = path.with_suffix(".png")
    storage.write_whole(path, chosen.picture(connector, found))
    console.print(f"Written: {path}", markup=False)


def _check(config: Config, args: argparse.Namespace) -> None:
    """Fills in the splits that the config names.

    What can be wrong should not wait for the model.
    """
    for flag, default in (
        ("split", config.eval.splits[0]),
        ("pages", config.data.validation_split),
    ):
        if flag in args:
            setattr(args, flag, getattr(args, flag) or default)
            shards.RecordSource(config.data.dir, getattr(args, flag))
    if "split" in args or "pages" in args:
        contents = functools.partial(shards.contents, config.data.dir)
        distributed.check_alike({f"the data in {config.data.dir}": contents})
    if args.analysis in NEED_WORDS:
        patch_tokens.check(config.model)
    for name in getattr(args, "connectors", ()):
        connectors.get(name)
        cost.with_connector(config, name)


def _chosen(argv: list[str]) -> Analysis:
    """The analysis that the flags name. A kind of noise has flags of its own."""
    name = _peek(argv)
    if name != "noise":
        return ANALYSES[name]
    # Of a misspelt kind argparse will tell.
    return NOISES.get(_peek(argv, "--kind"), ANALYSES[name])


def _peek(argv: list[str], flag: str = "--analysis") -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


def _parse(argv: list[str]) -> argparse.Namespace:
    """Flags of all analyses, and those of the one that is asked for: another's are wrong usage."""
    chosen = _chosen(argv)
    parser = argparse.ArgumentParser(
        prog="python -m alignvlm_jax inspect",
        description=f"Analysis: {chosen.help}.",
        allow_abbrev=False,
    )
    parser.add_argument("--analysis", choices=ANALYSES)
    parser.add_argument(
        "--checkpoint", type=storage.path, help="workdir, or one of its checkpoints/STEP"
    )
    parser.add_argument("--data", help="folder that `prepare` wrote; default: the one trained on")
    chosen.add_flags(parser)
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        parser.error(f"--analysis={args.analysis} needs --checkpoint=DIR")
    return args


def _measure_feature_noise(loaded: Loaded, args: argparse.Namespace) -> Mapping[str, Any]:
    return noise.measure(
        loaded, args.split, args.sigmas, args.relative_sigmas, args.num_pages, args.seed
    )


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


def _picture_noise(connector: str, found: Mapping[str, Any]) -> bytes:
    return noise.picture({connector: found})


NOISES = {
    "features": Analysis(
        "scores and movement of visual tokens under Gaussian noise on the vision features",
        analysis_flags.add_feature_noise,
        _measure_feature_noise,
        tables.show_noise,
        _picture_noise,
    ),
    "pixels": Analysis(
        "scores and movement of visual tokens under Gaussian noise on the page's pixels",
        analysis_flags.add_pixel_noise,
        _measure_pixel_noise,
        tables.show_noise,
        _picture_noise,
    ),
    "layout": Analysis(
        "scores where the content of pages is moved",
        analysis_flags.add_layout,
        _measure_layout,
        tables.show_noise,
        _picture_noise,
    ),
}
"""Kinds of noise."""

ANALYSES = {
    "noise": NOISES["features"],
    "vocabulary": Analysis(
        "which words ALIGN's patches use, and the scores with these alone",
        analysis_flags.add_vocabulary,
        _measure_vocabulary,
        tables.show_vocabulary,
        lambda connector, found: vocabulary.picture(found),
    ),
    "pca": Analysis(
        "how well the words that ALIGN's patches use cover the space of text embeddings",
        analysis_flags.add_pca,
        _measure_pca,
        tables.show_pca,
        lambda connector, found: pca.picture(found),
    ),
    "cost": Analysis(
        "parameters, FLOPs, memory and time of connectors beside the checkpoint's encoder and LLM",
        analysis_flags.add_cost,
        _measure_cost,
        tables.show_cost,
        cost.picture,
    ),
}
