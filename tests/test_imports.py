"""Imports run one way. Read from the source, so that an import inside a function counts as well."""

import ast
import pathlib
import subprocess
import sys

import pytest

from alignvlm_jax.models import connectors

PACKAGE = pathlib.Path(__file__).parent.parent / "alignvlm_jax"

# A part may import from itself and from what stands in a line above its own.
LEVELS = (
    ("errors", "shapes", "flag_types", "__version__"),
    ("config", "configs", "storage"),
    ("presets", "logs"),
    ("parallel", "ops", "data"),
    ("ingest", "models"),
    ("synthetic", "train"),
    ("weights", "pictures"),
    ("inference",),
    ("plan", "serving"),
    ("train.loop",),  # counts FLOPs as plans do; its evaluators are given to it
    ("benchmarks",),
    ("analysis",),
    ("report",),
    ("commands",),
    ("__init__", "__main__"),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# What only some files may import.
READERS_OF_FLAGS = ("commands/", "__main__.py")
ALLOWED = {
    "orbax": (
        "train/checkpoint.py",
        "train/checkpoint_files.py",
        "train/checkpoint_reading.py",
    ),
    # A command reads flags; an analysis says which ones it has.
    "argparse": (*READERS_OF_FLAGS, "analysis/", "flag_types.py"),
    "absl.flags": READERS_OF_FLAGS,
    "absl.app": READERS_OF_FLAGS,
    "configs": (),
    # By name only: what a config file sets is no part of the package.
    "alignvlm_jax.configs": ("commands/",),
    # Its packages are no part of the base install.
    "alignvlm_jax.synthetic": ("commands/work/prepare.py", "synthetic/"),
    "etils": ("storage/",),
    "fsspec": ("storage/",),
    "gcsfs": ("storage/",),
}
ONLY_IN_PARALLEL = {"NamedSharding", "PositionalSharding", "GSPMDSharding"}
NOT_IN_DATA = {"jax", "jaxlib", "jaxtyping", "flax", "optax", "orbax"}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imports(source: str) -> set[str]:
    """Dotted names of what is imported, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            found |= {f"{dots}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str:
    """The part of the package that a dotted name, without the package's own, belongs to."""
    loop = ".".join(module.split(".")[:2])
    return loop if loop in LEVEL else module.split(".")[0]


def is_in(file: str, places: tuple[str, ...]) -> bool:
    return any(
        file == place or (place.endswith("/") and file.startswith(place)) for place in places
    )


def violations(file: str, source: str) -> list[str]:
    """What `file` (relative to the package) must not do."""
    wrong = []
    part = part_of(file.removesuffix(".py").replace("/", "."))
    for name in sorted(imports(source)):
        # Files of an export find each other in whatever folder they stand.
        if name.startswith(".") and not file.startswith("weights/pytorch/"):
            wrong.append(f"relative import {name}")
        elif name.startswith("alignvlm_jax."):
            other = part_of(name.removeprefix("alignvlm_jax."))
            if other != part and LEVEL[other] >= LEVEL[part]:
                wrong.append(f"{part} imports {other}")
        wrong += [
            f"imports {library}"
            for library, places in ALLOWED.items()
            if f"{name}.".startswith(f"{library}.") and not is_in(file, places)
        ]
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "id", getattr(node, "attr", getattr(node, "name", None)))
        if name in ONLY_IN_PARALLEL and part != "parallel":
            wrong.append(f"names {name}")
    return wrong


@pytest.mark.parametrize("file", FILES)
def test_arrows(file):
    assert violations(file, (PACKAGE / file).read_text()) == []


def test_data_needs_no_jax():
    """Nor does any file of the package that these import, directly or not: their processes start
    without it."""
    rooms = ("data/", "ingest/", "synthetic/")
    reached = set()
    waiting = [file for file in FILES if file.startswith(rooms)]
    assert waiting
    while waiting:
        file = waiting.pop()
        reached.add(file)
        names = imports((PACKAGE / file).read_text())
        assert not {name.split(".")[0] for name in names} & NOT_IN_DATA, file
        for name in names:
            path = name.removeprefix("alignvlm_jax.").replace(".", "/")
            parent = path.rpartition("/")[0]
            candidates = {
                f"{path}.py",
                f"{parent}.py",
                f"{path}/__init__.py",
                f"{parent}/__init__.py",
            }
            waiting += (
                (candidates & set(FILES)) - reached if name.startswith("alignvlm_jax.") else ()
            )
    assert "errors.py" in reached


def test_what_prepares_data_starts_without_flax_and_models():
    """The one import that the source above does not show is `config.options`'s, of a connector by
    its name: it is made when a config is built. (jax itself comes with grain.)"""
    rooms = [
        file.removesuffix(".py").replace("/", ".")
        for file in FILES
        if file.startswith(("data/", "synthetic/"))
    ]
    modules = [
        f"alignvlm_jax.{room}".removesuffix(".__init__")
        for room in [*rooms, "config.reading", "ingest.job"]
    ]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]; "
        "print(*sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert not [
        name for name in ran.stdout.split() if name.startswith(("flax", "alignvlm_jax.models"))
    ]


def test_no_connector_is_named_where_any_may_stand():
    """What one connector does differently, it says itself; "mlp" is the name of other things as
    well."""
    names = connectors.REGISTRY.keys() - {"mlp"}
    # What exports take along computes each of them in PyTorch.
    places = ("models/connectors/", "config/options.py", "weights/pytorch/")
    for file in FILES:
        constants = {
            getattr(node, "value", None)
            for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        }
        named = {value for value in constants if isinstance(value, str)} & names
        assert not named or is_in(file, places), (file, named)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("ops/attention.py", "from alignvlm_jax.models import decoder", "ops imports models"),
        ("models/vlm.py", "import alignvlm_jax.train.state", "models imports train"),
        (
            "models/vlm.py",
            "def f():\n    from alignvlm_jax.train.state import split",
            "models imports train",
        ),
        ("data/examples.py", "from alignvlm_jax import models", "data imports models"),
        ("data/examples.py", "from alignvlm_jax.parallel.mesh import use", "data imports parallel"),
        (
            "train/loop.py",
            "from alignvlm_jax.benchmarks import generation_eval",
            "train.loop imports benchmarks",
        ),
        ("train/loop.py", "from alignvlm_jax.commands import train", "train.loop imports commands"),
        ("benchmarks/runner.py", "from . import scores", "relative import ..scores"),
        ("train/loop.py", "import orbax.checkpoint as ocp", "imports orbax"),
        ("train/loop.py", "from orbax import checkpoint", "imports orbax"),
        ("report/run.py", "import argparse", "imports argparse"),
        ("report/run.py", "from absl import flags", "imports absl.flags"),
        ("commands/train.py", "from configs import demo", "imports configs"),
        ("train/step.py", "from jax.sharding import NamedSharding", "names NamedSharding"),
        (
            "train/step.py",
            "import jax\nx = jax.sharding.NamedSharding(mesh, spec)",
            "names NamedSharding",
        ),
    ],
)
def test_violations_are_seen(file, source, complaint):
    assert violations(file, source) == [complaint]


def test_allowed_imports_are_not_violations():
    assert (
        violations("commands/train.py", "import argparse\nfrom alignvlm_jax.train import loop")
        == []
    )
    assert (
        violations(
            "train/checkpoint.py", "import orbax.checkpoint\nfrom alignvlm_jax.models import vlm"
        )
        == []
    )
    assert violations("parallel/mesh.py", "from jax.sharding import NamedSharding") == []
