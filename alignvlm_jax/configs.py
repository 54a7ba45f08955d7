"""The config files that come with the package, by name.

They lie in `configs/` of the repository, beside the package, and in a wheel within it: here they
are found in either place. This module is a package of them, for other config files to start from:
`from alignvlm_jax.configs import demo`.
"""

import ast
from pathlib import Path

from alignvlm_jax.errors import UserError, nearest

_BESIDE = Path(__file__).parents[1] / "configs"
_WITHIN = Path(__file__).with_suffix("")

# Within, where there is one: beside an installed package lie other packages.
FOLDER = _WITHIN if _WITHIN.is_dir() else _BESIDE

# What makes a module a package, whose modules are looked for there.
__path__ = [str(FOLDER)]


def names() -> list[str]:
    """Returns the names that `find` knows; files that only help others have no get_config."""
    files = sorted(FOLDER.glob("*.py"))
    return [file.stem for file in files if "\ndef get_config(" in file.read_text()]


def summary(name: str) -> str:
    """Returns what a config is for, the first line of its file."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return text.partition("\n")[0]


def is_name(text: str) -> bool:
    """Whether a text is a name rather than a path, which has a slash or ends in .py."""
    return bool(text) and "/" not in text and not text.endswith(".py")


def find(name: str) -> Path:
    """Returns the path of a config file by its name, such as "demo".

    Raises:
      UserError: there is none of this name; the message has those that there are.
    """
    known = names()
    if name in known:
        return FOLDER / f"{name}.py"
    # A hint that names no nearest one is the list of all.
    hint = nearest(name, known)
    listed = "" if "known: " in hint else f" known: {', '.join(known)}"
    raise UserError(f"no config {name!r}{hint}{listed}; a file of your own ends in .py")
