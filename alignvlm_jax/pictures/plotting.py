"""The common style of all plots, and plots as PNG files."""

import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = (
    "#2f7fd6", "#d9822b", "#1f8a5b", "#c8453b", "#7a6ad8",
    "#8a6d3b", "#d06bb0", "#5d6772", "#9aa82e", "#2ba8b4",
)  # fmt: skip
"""Colours of series, in their order; `color` begins again after the last."""

QUIET = "#c3cad1"
"""Colour of a baseline, with which other series are compared."""

DPI = 130
MAX_LETTERS = 20
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "text.parse_math": False,  # Document words may have dollar signs, matplotlib's math mode.
}
ON_WHITE = {
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
    "text.color": "#1c2127",
    "axes.labelcolor": "#1c2127",
    "xtick.color": "#1c2127",
    "ytick.color": "#1c2127",
    "axes.edgecolor": "#b4bbc2",
    "grid.color": "#dfe3e6",
}


def color(number: int) -> str:
    """Returns the colour of the series of this number, counted from 0."""
    return COLORS[number % len(COLORS)]


def png(inches: tuple[float, float], draw: Callable[[Figure], None]) -> bytes:
    """Returns a PNG, on white, of a figure of this size that `draw` fills."""
    with mpl.rc_context(STYLE | ON_WHITE):
        figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
        draw(figure)
        return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG, the same bytes each time."""
    buffer = io.BytesIO()
    # By default matplotlib writes its version into the file.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def legible(word: str) -> str:
    """Returns a word as a plot can show it: characters that the font lacks are spelled as code
    points, and it is cut after MAX_LETTERS."""
    font = font_manager.get_font(font_manager.findfont("monospace"))
    spelled = "".join(c if font.get_char_index(ord(c)) else f"⟨{ord(c):X}⟩" for c in word)
    return spelled if len(spelled) <= MAX_LETTERS else f"{spelled[: MAX_LETTERS - 1]}…"


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    colors: Sequence[str],
) -> None:
    """Draws horizontal bars from the top down, each with its text at its end, in the place of
    numbers along the axis."""
    drawn = axes.barh(range(len(names)), values, color=colors, height=0.66)
    axes.bar_label(drawn, texts, padding=4, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)  # Reversed, so that the first bar is on top.
    axes.margins(x=0.2)  # Room for the texts.
    axes.set_xlim(left=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
