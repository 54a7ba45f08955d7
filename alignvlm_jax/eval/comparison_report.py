"""The page of a comparison: pictures and tables, in one file that needs no other; and the pictures beside it."""

from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.eval import comparison_figures, comparison_tables, gallery, html
from alignvlm_jax.eval.comparison import Tables

FILE = "report.html"


def build(tables: Tables, folder: Path) -> Path:
    """Writes report.html and TABLE_scores.png, TABLE_learning.png and TABLE_noise.png in `folder`; returns the page's
    path."""
    parts = []
    for (name, grids), rows in zip(comparison_tables.grids(tables).items(), tables.values(), strict=True):
        pictures = {
            "scores": comparison_figures.scores(rows),
            "learning": comparison_figures.learning(rows),
            "noise": comparison_figures.noise(rows),
        }
        for kind, picture in pictures.items():
            storage.write_whole(folder / f"{name}_{kind}.png", picture)
        uris = {kind: gallery.png_uri(picture) for kind, picture in pictures.items()}
        parts.append({"grids": grids, "pictures": uris})
    path = folder / FILE
    storage.write_whole(path, html.render("comparison.html", parts=parts, folder=folder))
    return path
