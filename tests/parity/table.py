"""The table of differences, written as it grows to runs/parity.md."""

from pathlib import Path

import numpy as np

FILE = Path("runs/parity.md")
HEAD = "| model | case | largest difference | of numbers up to |\n|---|---|---|---|\n"
_rows: list[str] = []


def record(
    model: str, case: str, ours: np.ndarray, reference: np.ndarray, tolerance: float
) -> None:
    """Adds a row, and asserts that the largest absolute difference is within `tolerance`."""
    assert ours.shape == reference.shape and reference.std() > 0.1
    difference = np.abs(ours - reference).max()
    _rows.append(f"| {model} | {case} | {difference:.1e} | {np.abs(reference).max():.1f} |\n")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(HEAD + "".join(_rows))
    assert difference <= tolerance, f"{model}, {case}: {difference}"
