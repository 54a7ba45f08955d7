"""The analyses that a workdir holds, for its report: a picture, and a sentence with the main
numbers of each."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignvlm_jax.pictures import html

Fields = Mapping[str, Any]


class Section(NamedTuple):
    """Of an analysis: its title, and what makes the sentence of the fields of its file."""

    title: str
    sentence: Callable[[Fields], str]


def sections(folder: Path, found: Mapping[str, Fields]) -> list[dict[str, Any]]:
    """Returns what the report shows of each analysis, in the order of SECTIONS.

    Args:
      folder: that holds the files NAME.json, and the pictures NAME.png beside them, if they were
        drawn.
      found: what the files hold by NAME; other analyses than those of SECTIONS are left out.
    """
    return [
        {
            "title": section.title,
            "sentence": section.sentence(found[name]),
            "source": _source(found[name]),
            "picture": _picture(folder / f"{name}.png"),
        }
        for name, section in SECTIONS.items()
        if name in found
    ]


def _source(fields: Fields) -> str:
    """What was looked at."""
    settings = fields["settings"]
    asked = (
        f"{settings['num_questions']:,} questions of {settings['split']}"
        if "split" in settings
        else ""
    )
    pages = f"patches of {settings['pages']}" if "pages" in settings else ""
    return ", ".join(filter(None, (asked, pages, f"step {fields['step']}"))).replace("_", " ")


def _picture(path: Path) -> str | None:
    return html.png_uri(path.read_bytes()) if path.exists() else None


def _about_noise(field: str, size: str) -> Callable[[Fields], str]:
    """Of curves over `field`; `size` is how one is put in words."""

    def sentence(fields: Fields) -> str:
        clean, *points = fields["points"]
        text = f"Undisturbed, the answers score ANLS {clean['anls']:.3f}"
        if not points:
            return f"{text}."
        kept = _kept(clean, points)
        last = points[-1]
        if kept is None:
            text += (
                f"; less than nine tenths of that are left at {size.format(points[0][field])} "
                "already"
            )
        else:
            text += f"; at least nine tenths of that are left up to {size.format(kept[field])}"
        text += f", and ANLS {last['anls']:.3f} at {last[field]:.3g}"
        if "centred_distance" in last:
            fraction = last["centred_distance"] / fields["centred_between_distance"]
            text += (
                f", which moves visual tokens by {fraction:.2f} of the distance between "
                "different ones"
            )
        return f"{text}."

    return sentence


def _kept(clean: Fields, points: Sequence[Fields]) -> Fields | None:
    """The last point before the first that has less than nine tenths of the score."""
    kept = None
    for point in points:
        if point["anls"] < 0.9 * clean["anls"]:
            break
        kept = point
    return kept


def _about_vocabulary(fields: Fields) -> str:
    everything, by_mean, _ = fields["pruning"]
    return (
        f"A patch's distribution has the perplexity of {fields['perplexity']['p50']:.1f} words "
        f"(median), the mean of all that of {fields['mean_perplexity']:.1f}; with the "
        f"{by_mean['num_words']:,} words alone whose mean is above "
        f"{fields['settings']['threshold']:g} the answers score ANLS {by_mean['anls']:.3f}, with "
        f"all {everything['num_words']:,} {everything['anls']:.3f}."
    )


def _about_pca(fields: Fields) -> str:
    chosen, random, frequent = (
        f"{100 * fields['sets'][name]['explained']:.1f} %"
        for name in ("chosen", "random", "most frequent")
    )
    return (
        f"The first {fields['num_components']} principal components of the "
        f"{fields['num_chosen']:,} words that patches use explain {chosen} of the variance of all "
        f"{fields['num_words']:,} text embeddings; those of as many random words explain "
        f"{random}, of the most frequent {frequent}."
    )


def _about_cost(fields: Fields) -> str:
    costs = fields["costs"]
    shown = next((cost for cost in costs if cost["connector"] == fields["connector"]), costs[0])
    quickest = min(costs, key=lambda cost: cost["encode_seconds"])
    text = (
        f"With {shown['connector']}, {html.count(shown['num_params'])} parameters, a page takes "
        f"{1e3 * shown['encode_seconds']:.2f} ms from pixels to its {shown['tokens_per_page']:,} "
        f"visual tokens ({fields['device']})"
    )
    if quickest is not shown:
        text += (
            f"; with {quickest['connector']}, the quickest, "
            f"{1e3 * quickest['encode_seconds']:.2f} ms"
        )
    return f"{text}."


SECTIONS = {
    "noise": Section(
        "Noise on the vision features",
        _about_noise("relative_sigma", "noise of {:.3g} times the features' standard deviation"),
    ),
    "noise_pixels": Section(
        "Noise on the pixels",
        _about_noise("sigma", "noise of {:.3g} of the range from black to white"),
    ),
    "noise_layout": Section(
        "Content that is moved", _about_noise("shift", "shifts of at most {} px")
    ),
    "vocabulary": Section("Words that patches use", _about_vocabulary),
    "pca": Section("What these words span", _about_pca),
    "cost": Section("What connectors cost", _about_cost),
}
"""By the name of an analysis."""
