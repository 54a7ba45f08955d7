"""What keeps the code readable, as numbers that may only get better; and the map of its rooms."""

import ast
import pathlib
import re

import pytest

from tests.style import measure

REPOSITORY = pathlib.Path(__file__).parents[2]
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"

# What was reached. Lower one when it has become less; nothing here may rise.
AT_MOST = {
    "files that are no entries of a registry": 177,
    "of them under 60 lines with a single importer": 1,
    "longest file, lines": 372,
    "longest function, lines": 91,
    "functions that take the whole Config": 30,
    "lines over 100 columns": 0,
    "double assignments": 0,
}
AT_LEAST = {"comment lines": 0.050}


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return measure.measure()


def test_nothing_gets_worse(measured):
    risen = {name: measured[name] for name, bound in AT_MOST.items() if measured[name] > bound}
    fallen = {name: measured[name] for name, bound in AT_LEAST.items() if measured[name] < bound}
    assert not risen and not fallen


def test_the_table_is_that_of_the_code(measured):
    """`python -m tests.style.measure` prints it."""
    assert measure.table(measured) in ARCHITECTURE.read_text()


def test_the_map_names_every_room_and_nothing_that_is_not_there():
    text = ARCHITECTURE.read_text()
    rooms = {path.name for path in measure.PACKAGE.iterdir() if (path / "__init__.py").exists()}
    cells = [
        line.split("|")[1]
        for line in text.split("## Rooms")[1].split("\n## ")[0].splitlines()
        if "|" in line
    ]
    assert rooms == set(re.findall(r"`(\w+)/`", " ".join(cells)))
    for file, name in re.findall(r"`((?:\w+/)+\w+\.py)(?::([\w.]+))?`", text):
        [path] = [root / file for root in (REPOSITORY, measure.PACKAGE) if (root / file).exists()]
        leaf = name.rpartition(".")[2]
        assert not leaf or re.search(
            rf"^\s*(?:def|class) {leaf}\b|^{leaf}(?::.*)? = ", path.read_text(), re.M
        ), (
            file,
            name,
        )


def test_measures_see_what_they_count():
    text = (
        "import a\n\n\ndef f(config: Config) -> None:\n    a, b = 1, 2  # two\n    c, d = "
        "pair\n    return None\n"
    )
    tree = ast.parse(text)
    assert measure.num_comment_lines(text) == 1
    assert sum(map(measure.is_double, ast.walk(tree))) == 1
    assert measure.takes_config(tree.body[1])
    modules = {"p": "import p.a", "p.a": "from p import b", "p.b": "from p.a import f"}
    assert measure.importers(modules) == {"p": set(), "p.a": {"p", "p.b"}, "p.b": {"p.a"}}
