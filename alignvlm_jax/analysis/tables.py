"""Results of analyses as tables to print."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

NOISE_COLUMNS = {
    "sigma": ("sigma", ".3f"),
    "relative_sigma": ("in its units", ".2f"),
    "shift": ("pixels at most", "d"),
    "relative_shift": ("patches", ".2f"),
    "anls": ("ANLS", ".3f"),
    "exact_match": ("exact match", ".3f"),
    "distance": ("cos. distance", ".4f"),
    "centred_distance": ("mean removed", ".4f"),
}
"""By field of a point: the title of its column, and its format."""


def show_noise(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what a function of `noise` returns: a row a size, and what distances are to be
    compared with."""
    if "feature_std" in found:
        console.print(
            f"The features' standard deviation over patches is {found['feature_std']:.3f}."
        )
    if "patch_pixels" in found:
        console.print(
            f"The shorter side of a patch is {found['patch_pixels']:.3g} pixels of the page."
        )
    columns = {name: column for name, column in NOISE_COLUMNS.items() if name in found["points"][0]}
    table = _table(*(title for title, _ in columns.values()))
    for point in found["points"]:
        table.add_row(*(format(point[name], spec) for name, (_, spec) in columns.items()))
    console.print(table)
    if "between_distance" in found:
        console.print(
            "Between different visual tokens, without noise: cosine distance "
            f"{found['between_distance']:.4f}, with the mean removed "
            f"{found['centred_between_distance']:.4f}."
        )


def show_vocabulary(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what `vocabulary.measure` returns: how sharp patches are, their words, the scores with
    these alone."""
    table = _table(f"{found['num_patches']:,} patches", "mean", "5 %", "50 %", "95 %")
    for name, unit in (("entropy", "bits"), ("perplexity", "words")):
        table.add_row(f"{name}, {unit}", *(f"{value:.2f}" for value in found[name].values()))
    console.print(table)
    console.print(
        f"Their mean distribution: perplexity {found['mean_perplexity']:.1f} words, peak "
        f"{found['mean_peak']:.4f}\n"
    )
    table = _table("word", "mean", "likeliest in")
    for word in found["top_words"]:
        table.add_row(
            escape(word["token"]), f"{word['mean']:.4f}", f"{word['share_of_patches']:.1%}"
        )
    console.print(table)
    table = _table("words kept", "number", "ANLS", "exact match", "questions")
    for trial in found["pruning"]:
        scores = f"{trial['anls']:.4f}", f"{trial['exact_match']:.4f}"
        table.add_row(trial["words"], f"{trial['num_words']:,}", *scores, f"{trial['num_eval']:,}")
    console.print()
    console.print(table)


def show_cost(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what `cost.measure` returns: a row a connector."""
    console.print(
        f"{found['device']}, {found['batch_size']} pages at once of {found['tiles_per_page']} "
        f"tiles, answers of {found['answer_tokens']} tokens; vision encoder and LLM: "
        f"{found['num_tower_params']:,} parameters"
    )
    titles = ("tokens", "parameters", "GFLOP", "encode ms", "answer ms", "tokens/s", "temp. MiB")
    table = _table("connector", *titles)
    for cost in found["costs"]:
        table.add_row(
            cost["connector"],
            f"{cost['tokens_per_page']:,}",
            f"{cost['num_params']:,}",
            f"{cost['gflops']:.3g}",
            f"{1e3 * cost['encode_seconds']:.2f}",
            f"{1e3 * cost['answer_seconds']:.2f}",
            f"{cost['tokens_per_second']:.1f}",
            f"{cost['temporary_mib']:.1f}",
        )
    console.print(table)
    for name, reason in found["left_out"].items():
        console.print(f"{name} is left out: {reason}", markup=False)


def show_pca(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what `pca.measure` returns: a row a set of words."""
    console.print(
        f"{found['num_chosen']:,} of {found['num_words']:,} words chosen. The first "
        f"{found['num_components']} principal components of all explain "
        f"{sum(found['shares']):.1%} of their variance, the first two "
        f"{sum(found['shares'][:2]):.1%}."
    )
    table = _table("words", "its components explain", "distance to those outside")
    for name, one in found["sets"].items():
        nearest = "-" if one["nearest"] is None else f"{one['nearest']:.3f}"
        table.add_row(name, f"{one['explained']:.1%}", nearest)
    console.print(table)


def _table(first: str, *titles: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, title in enumerate((first, *titles)):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    return table
