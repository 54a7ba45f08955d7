"""pyproject.toml has ranges for those who install the package, requirements*.txt the versions that
`make demo` and `make test` install: each of these lies within its range."""

import pathlib
import tomllib

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BASE = PROJECT["dependencies"]

# What a file locks: its name, and the lists of pyproject.toml that it is for.
LOCKS = {
    "requirements.txt": BASE + EXTRAS["test"] + EXTRAS["gcs"] + EXTRAS["serve"],
    "requirements-demo.txt": EXTRAS["demo"],
    "requirements-gpu.txt": EXTRAS["gpu"],
    "requirements-tpu.txt": EXTRAS["tpu"],
}


def key(requirement: Requirement) -> str:
    """The name of a package with its extras: jax[tpu] is another package than jax."""
    return "".join([requirement.name.lower().replace("_", "-"), *sorted(requirement.extras)])


def locked(file: str) -> list[Requirement]:
    """The lines of a file, of each version of Python."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


@pytest.mark.parametrize("file", LOCKS)
def test_what_is_locked_is_what_is_asked_for_and_within_its_range(file):
    ranges = {key(one): one.specifier for one in map(Requirement, LOCKS[file])}
    lines = locked(file)
    assert {key(one) for one in lines} == ranges.keys()
    for one in lines:
        [exact] = one.specifier
        assert exact.operator == "==" and ranges[key(one)].contains(exact.version), str(one)


def test_what_beam_is_tried_with_is_within_the_ranges_too():
    """Its venv has older versions, with which data are prepared."""
    ranges = {key(one): one.specifier for one in map(Requirement, BASE + EXTRAS["test"])}
    for one in locked("requirements-beam.txt"):
        [exact] = one.specifier
        assert key(one) not in ranges or ranges[key(one)].contains(exact.version), str(one)


def test_no_range_replaces_what_an_environment_has():
    for one in map(Requirement, [*BASE, *(line for lines in EXTRAS.values() for line in lines)]):
        assert [part.operator for part in one.specifier] == [">="], str(one)
