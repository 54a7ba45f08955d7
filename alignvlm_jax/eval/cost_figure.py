"""What `cost.measure` found, as a picture."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from alignvlm_jax.eval import html, plotting

WIDTH, BAR_HEIGHT, FRAME_HEIGHT = 10.0, 0.36, 0.75
"""Inches."""


def picture(connector: str, found: Mapping[str, Any]) -> bytes:
    """Returns a PNG of parameters, time to encode a page and tokens a page by connector, the model's own coloured."""
    costs = found["costs"]
    names = [cost["connector"] for cost in costs]
    colors = [plotting.COLORS[0] if name == connector else plotting.QUIET for name in names]
    panels = {
        "Parameters": [(cost["num_params"], html.count(cost["num_params"])) for cost in costs],
        "Pixels to visual tokens, ms a page": [
            (cost["encode_seconds"], f"{1e3 * cost['encode_seconds']:,.2f}") for cost in costs
        ],
        "Tokens a page": [(cost["tokens_per_page"], f"{cost['tokens_per_page']:,}") for cost in costs],
    }

    def draw(figure: Figure) -> None:
        for axes, (title, bars) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            values, texts = zip(*bars, strict=True)
            plotting.bars(axes, names, values, texts, colors)
            axes.set_title(title)
            axes.label_outer()

    return plotting.png((WIDTH, FRAME_HEIGHT + BAR_HEIGHT * len(costs)), draw)
