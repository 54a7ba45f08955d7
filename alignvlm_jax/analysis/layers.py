"""Where visual tokens belong: the layer after which the text states lie that they are nearest to.

LatentLens (arXiv 2602.00462) compares the visual tokens of a model, at its input and after each of
its layers, with the states that tokens of a text have in context after every layer. In its models,
whose connectors are MLPs, most visual tokens are nearest to states of the middle layers at the
input already. ALIGN's visual tokens are averages of the input embeddings, layer 0 here.

Here the text is that of the same pages, and states are compared by their cosine in two forms: as
they are, which is the paper's, and with the mean of each side subtracted, that of the visual tokens
after a layer and that of the text after a layer. States of a layer have a large mean in common, so
that the plain cosine tells first of all whose means are alike; the other tells which tokens are.
States are those between layers, before the final norm.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console

from alignvlm_jax.analysis import base, displacement, shown, states
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import connectors
from alignvlm_jax.pictures import plotting
from alignvlm_jax.shapes import Array, Float, Int

FORMS = {"cosine": "cosine", "centred": "cosine, means removed"}
BANKS = {"own": "same layer", "input": "input", "any": "any layer"}
"""The text states among which the nearest is searched, in the label part."""
PIECE = 2**24
"""Most cosines that are held at a time."""
MAX_NUMBERS = 12
"""Most layers of a picture whose cells have their numbers in them."""
INCHES = (12.6, 4.2)


class Layers(Analysis):
    """The analysis of the layer whose text states visual tokens are nearest to."""

    name = "layers"
    title = "Where visual tokens belong"

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure(loaded, args.pages, args.num_pages, args.num_states, args.seed)

    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints a table for each form of the cosine, with a row for each layer."""
        console.print(
            f"{found['num_visual']:,} visual tokens and {found['num_text']:,} tokens of text, at "
            f"the input (layer 0) and after each of {len(found['cosine']['layers']) - 1} layers; "
            f"{found['num_labelled']:,} of the visual tokens show a known token."
        )
        if not found["has_labels"]:
            console.print(
                "The connector has no token for each patch: what a visual token shows is not known."
            )
        for form, title in FORMS.items():
            columns = ["nearest at layer", "tokens there", "cosine"]
            if found["num_labelled"]:
                columns += [f"shown, {bank}" for bank in BANKS.values()] + ["shuffled at most"]
            table = base.table("layer", *columns)
            for layer, row in enumerate(found[form]["layers"]):
                table.add_row(f"{layer}", *_cells(row, found["num_labelled"]))
            console.print(f"\nBy the {title}:")
            console.print(table)

    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of the layers of the nearest text states, by the layer of visual tokens,
        and of the fractions that show what their nearest state is of."""

        def draw(figure: Figure) -> None:
            panels = figure.subplots(1, 3 if found["num_labelled"] else 2)
            for axes, (form, title) in zip(panels, FORMS.items(), strict=False):
                _draw_histogram(axes, np.array(found[form]["histogram"]))
                axes.set_title(f"Nearest text: {title}")
            panels[0].set_ylabel(f"visual tokens of {connector}, layer")
            if found["num_labelled"]:
                _draw_fractions(panels[2], found["centred"]["layers"])

        return plotting.png(INCHES, draw)

    def sentence(self, written: Mapping[str, Any]) -> str:
        first = written["cosine"]["layers"][0]
        text = (
            f"At the LLM's input {100 * first['fraction']:.0f} % of visual tokens are nearest to "
            f"text states of layer {first['nearest']} (mean cosine {first['cosine']:.2f})"
        )
        if not written["num_labelled"]:
            return f"{text}."
        own, shuffled = (100 * first[name]["own"] for name in ("shown", "shuffled"))
        return (
            f"{text}; of those that show text {own:.0f} % are nearest to the embedding of a token "
            f"that their patch shows, {shuffled:.0f} % if patches are shuffled."
        )


ANALYSIS = Layers()


class Nearest(NamedTuple):
    """The text states that are nearest to n visual tokens, after each of the layers and at the
    input, L together.

    Attributes:
      cosines: the cosine of each, float32 [L, n].
      indices: their number among the text's tokens, int [L, n].
    """

    cosines: np.ndarray
    indices: np.ndarray


def measure(
    loaded: Loaded, split: str, num_pages: int, num_states: int, seed: int
) -> dict[str, Any]:
    """Returns where the text states lie that are nearest to visual tokens, layer by layer.

    Args:
      loaded: the model.
      split: name of the split whose pages and whose text are used.
      num_pages: number of its records that are used, spread evenly.
      num_states: the largest number of visual tokens, and of tokens of the text.
      seed: of the choice of tokens where there are more, and of the shuffled labels.

    Raises:
      UserError: the split is missing, or its records have no images or no words.
    """
    pages = [page for page in base.pages(loaded, split, num_pages) if page.images]
    if not pages:
        raise UserError(f"split {split!r} in {loaded.config.data.dir} has no images")
    rng = np.random.default_rng(seed)
    # The text first: a split without words is found before any page is encoded.
    text, tokens = states.of_text(loaded, pages, split, num_states, rng)
    visual, chosen = states.of_pages(loaded, pages, num_states, rng)
    has_labels = connectors.get(loaded.config.model.connector.name).has_patch_tokens()
    # Without labels each patch shows one token that is none.
    of_patches = np.full((len(chosen), 1), shown.NONE)
    if has_labels:
        of_patches = shown.of_patches(loaded, pages).tokens[chosen]
    # Together, since the numbers of characters are those of one call.
    numbers = shown.characters(loaded.tokenizer, np.concatenate([of_patches.ravel(), tokens]))
    labels = numbers[: of_patches.size].reshape(of_patches.shape)
    spoken = numbers[of_patches.size :]
    is_labelled = (labels != shown.NONE).any(-1)
    # Among those that show text: their labels are as frequent as before, and in other places.
    shuffled = labels.copy()
    shuffled[is_labelled] = rng.permutation(labels[is_labelled])
    found = {
        "num_visual": visual.shape[1],
        "num_text": text.shape[1],
        "has_labels": has_labels,
        "num_labelled": int(is_labelled.sum()),
    }
    for form in FORMS:
        sides = [_units(side, is_centred=form == "centred") for side in (visual, text)]
        each = [nearest(layer, sides[1]) for layer in sides[0]]
        found[form] = {
            "histogram": [_histogram(one).round(5).tolist() for one in each],
            "layers": [
                _row(one, layer, spoken, labels, shuffled, is_labelled)
                for layer, one in enumerate(each)
            ],
        }
    return found


def nearest(queries: Float[np.ndarray, "n D"], banks: Float[np.ndarray, "L S D"]) -> Nearest:
    """Returns for each query its nearest row in each bank, by the cosine of unit vectors."""
    step = max(PIECE // banks.shape[1], 1)
    pieces = [queries[start : start + step] for start in range(0, len(queries), step)]
    # [L, pieces, 2, step] -> [L, n]: all rows of a bank, and a piece of the queries, at a time.
    found = []
    for bank in banks:
        on_device = jnp.asarray(bank)
        best = [jax.device_get(_largest(piece, on_device)) for piece in pieces]
        found.append([np.concatenate(arrays) for arrays in zip(*best, strict=True)])
    return Nearest(*(np.stack(arrays) for arrays in zip(*found, strict=True)))


@jax.jit
def _largest(
    queries_nD: Float[Array, "n D"], bank_SD: Float[Array, "S D"]
) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    # In full float32: TPUs would round to bfloat16, and near neighbours differ by less.
    cosines_nS = jnp.matmul(queries_nD, bank_SD.T, precision="highest")
    return cosines_nS.max(-1), cosines_nS.argmax(-1)


def _units(rows: Float[np.ndarray, "L n D"], is_centred: bool) -> Float[np.ndarray, "L n D"]:
    """Returns states of length 1, with the mean over tokens subtracted after each layer or not."""
    found = np.empty_like(rows)
    # A layer at a time: `unit` computes in float64.
    for layer, of in enumerate(rows):
        found[layer] = displacement.unit(of - of.mean(0) if is_centred else of)
    return found


def _histogram(found: Nearest) -> Float[np.ndarray, "L"]:
    """Returns the fraction of visual tokens whose nearest text state is after each layer."""
    layers = len(found.cosines)
    return np.bincount(found.cosines.argmax(0), minlength=layers) / found.cosines.shape[1]


def _row(
    found: Nearest,
    layer: int,
    spoken: np.ndarray,
    labels: np.ndarray,
    shuffled: np.ndarray,
    is_labelled: np.ndarray,
) -> dict[str, Any]:
    """Returns the result for the visual tokens after a layer.

    Args:
      found: their nearest text states.
      layer: its number; 0 is the input.
      spoken: characters of the tokens of the text, int [S].
      labels: characters that the patches show, int [n, k].
      shuffled: those of other patches, int [n, k].
      is_labelled: whether a patch shows any, bool [n].
    """
    fractions = _histogram(found)
    every = np.arange(found.cosines.shape[1])
    closest = found.cosines.argmax(0)
    row = {
        "nearest": int(fractions.argmax()),
        "fraction": float(fractions.max()),
        "cosine": float(found.cosines.max(0).mean()),
    }
    if not is_labelled.any():
        return row
    banks = {"own": layer, "input": 0, "any": closest}
    for name, truth in {"shown": labels, "shuffled": shuffled}.items():
        row[name] = {}
        for bank, of in banks.items():
            is_shown = (spoken[found.indices[of, every]][:, None] == truth).any(-1)
            row[name][bank] = float(is_shown[is_labelled].mean())
    return row


def _cells(row: Mapping[str, Any], has_labels: int) -> list[str]:
    cells = [f"{row['nearest']}", f"{row['fraction']:.1%}", f"{row['cosine']:.3f}"]
    if has_labels:
        cells += [f"{row['shown'][bank]:.1%}" for bank in BANKS]
        cells.append(f"{max(row['shuffled'].values()):.1%}")
    return cells


def _draw_histogram(axes: Axes, histogram: np.ndarray) -> None:
    """Draws fractions [layer of visual tokens, layer of text]."""
    axes.imshow(histogram, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.set_xlabel("text states, layer (0: input embeddings)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if len(histogram) > MAX_NUMBERS:
        return
    for layer, fractions in enumerate(histogram):
        for other, fraction in enumerate(fractions):
            color = "white" if fraction > 0.5 else "#1c2127"
            text = f"{fraction:.0%}" if fraction else ""
            axes.text(other, layer, text, ha="center", va="center", fontsize=9, color=color)


def _draw_fractions(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the fractions of patches whose nearest state is of what they show, by layer."""
    for number, (bank, title) in enumerate(BANKS.items()):
        values = [row["shown"][bank] for row in rows]
        axes.plot(values, marker="o", markersize=4, color=plotting.color(number), label=title)
    shuffled = [max(row["shuffled"].values()) for row in rows]
    axes.plot(shuffled, color=plotting.QUIET, label="labels shuffled, the most")
    axes.set_title("Nearest state is of what the patch shows")
    axes.set_xlabel("visual tokens, layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1)
    axes.grid(axis="y")
    # Below: the curves may be anywhere.
    axes.legend(fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
