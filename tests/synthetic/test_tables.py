import itertools

import numpy as np
import pytest

from alignvlm_jax.benchmarks.scores import anls


def columns(tables):
    for table in tables:
        for index in range(1, len(table.header)):
            yield f"{table.name}/{table.header[index]}", [row[index] for row in table.rows]


def test_tables_are_whole(all_tables):
    assert len(all_tables) >= 8
    for table in all_tables:
        keys = [row[0] for row in table.rows]
        assert len(set(keys)) == len(keys) >= 10
        assert all(len(row) == len(table.header) for row in table.rows)
        assert all(len(value) >= 4 and value.isascii() for row in table.rows for value in row[1:])


def test_values_cannot_be_guessed(all_tables):
    """Neither by a constant nor from the row above: learning the tables by heart must not help."""
    rng = np.random.default_rng(0)
    scores = []
    for name, drawn in columns(all_tables):
        sample = [drawn[i] for i in rng.permutation(len(drawn))[:80]]
        best = max(np.mean([anls(guess, (value,)) for value in sample]) for guess in sample)
        above = np.mean([anls(a, (b,)) for a, b in itertools.pairwise(drawn)])
        scores.append((name, best, above))
        assert best < 0.25 and above < 0.25, (name, best, above)
    assert np.mean([score[1:] for score in scores]) < 0.12


@pytest.mark.parametrize(
    "name, key, expected",
    [("driving", "1956", ("3675",)), ("longley", "1947", ("234289", "60323"))],
)
def test_values_are_the_data_sets(all_tables, name, key, expected):
    table = next(table for table in all_tables if table.name == name)
    assert dict((row[0], row[1:]) for row in table.rows)[key] == expected
