"""Real tables of `vega_datasets` (MIT) and `statsmodels` (BSD-3), as plain strings.

Only columns that cannot be guessed are taken: the best constant answer, and the value of the row
above, score little by ANLS. That leaves out most slowly changing series (prices, temperatures,
years) and values of few digits.
"""

import pandas as pd
from statsmodels import datasets
from vega_datasets import local_data

from alignvlm_jax.synthetic.contents import Table

MIN_VALUE_LENGTH = 4
MAX_CELL_LENGTH = 10


def load() -> tuple[Table, ...]:
    """Returns the tables, in a fixed order."""
    airports = local_data.airports().rename(columns={"iata": "airport"})
    # One row a year, with a column for each source of energy.
    power = local_data.iowa_electricity().pivot(
        index="year", columns="source", values="net_generation"
    )
    power = power.set_index(power.index.year).reset_index()
    power = power.rename(columns={"Fossil Fuels": "fossil", "Nuclear Energy": "nuclear"})
    macro = datasets.macrodata.load_pandas().data
    macro["quarter"] = [
        f"{y:.0f}Q{q:.0f}" for y, q in zip(macro["year"], macro["quarter"], strict=True)
    ]
    states = datasets.statecrime.load_pandas().data.reset_index()
    return (
        _table("airports", airports, "airport", {"city": "", "latitude": ".4f"}),
        _table("driving", local_data.driving(), "year", {"miles": ".0f"}),
        _table("power", power, "year", {"fossil": ".0f", "nuclear": ".0f"}),
        _table("macrodata", macro, "quarter", {"realgdp": ".2f", "realinv": ".2f"}),
        _table(
            "star98",
            _numbered(datasets.star98, "school"),
            "school",
            {"LOWINC": ".2f", "PERHISP": ".2f", "PCTAF": ".2f", "AVSALK": ".2f"},
        ),
        _table(
            "engel", _numbered(datasets.engel, "home"), "home", {"income": ".2f", "foodexp": ".2f"}
        ),
        _table("ccard", _numbered(datasets.ccard, "card"), "card", {"AVGEXP": ".2f"}),
        _table(
            "longley", datasets.longley.load_pandas().data, "YEAR", {"GNP": ".0f", "TOTEMP": ".0f"}
        ),
        _table("states", states, "state", {"urban": ".2f"}),
    )


def _numbered(dataset, key: str) -> pd.DataFrame:
    """Returns a data set whose rows have no names, with row numbers from 1 as column `key`."""
    frame = dataset.load_pandas().data
    return frame.assign(**{key: range(1, len(frame) + 1)})


def _table(name: str, frame: pd.DataFrame, key: str, formats: dict[str, str]) -> Table:
    """Returns a table of the column `key` and the columns in `formats`, by their format; rows with
    cells that are too long or not ASCII, or with values that are short, are left out."""
    # Keys such as years may be stored as floats.
    keys = [f"{value:.0f}" if isinstance(value, float) else str(value) for value in frame[key]]
    columns = [[format(value, spec) for value in frame[column]] for column, spec in formats.items()]
    rows = [
        row
        for row in zip(keys, *columns, strict=True)
        if all(cell.isascii() and len(cell) <= MAX_CELL_LENGTH for cell in row)
        and all(len(cell) >= MIN_VALUE_LENGTH for cell in row[1:])
    ]
    return Table(name, (key.lower(), *(column.lower() for column in formats)), tuple(rows))
