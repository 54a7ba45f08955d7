"""How the code looks, in numbers: `python -m tests.style.measure` prints the table of
docs/architecture.md."""

import ast
import io
import pathlib
import tokenize

PACKAGE = pathlib.Path(__file__).parents[2] / "alignvlm_jax"
COLUMNS = 100
ENTRIES = (
    "analysis",
    "benchmarks.scores",
    "commands",
    "data.tokenizers",
    "ingest.formats",
    "models.connectors",
    "weights.families",
    "weights.formats",
    # No registry, but files that exports take along.
    "weights.pytorch",
)
"""Rooms whose files are entries of a registry: who adds one has done nothing to be held against
it, however small it is."""
SMALL = 60
"""Lines of a file that is a part of its only importer."""


def sources() -> dict[str, str]:
    """Returns the text of every module of the package that has any, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if text := path.read_text():
            found[name] = text
    return found


def importers(modules: dict[str, str]) -> dict[str, set[str]]:
    """Returns by module the other modules that import it, or a name in it."""
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from a import b` is of the module a.b where there is one, else of a name in a.
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [one if one in modules else node.module for one in full]
            else:
                continue
            for target in targets:
                if target in found and target != name:
                    found[target].add(name)
    return found


def is_entry(name: str) -> bool:
    """Whether a module is an entry of a registry."""
    return any(name.startswith(f"{PACKAGE.name}.{room}.") for room in ENTRIES)


def num_comment_lines(text: str) -> int:
    """Returns the lines of a module that hold a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def takes_config(function: ast.FunctionDef) -> bool:
    """Whether a function takes the whole config of a stage."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = (ast.unparse(one.annotation) for one in arguments if one.annotation is not None)
    return any(name in ("Config", "config_lib.Config") for name in names)


def is_double(node: ast.AST) -> bool:
    """Whether a statement assigns several values to several names, as `a, b = 1, 2`."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def measure() -> dict[str, float]:
    """Returns the measures of the package by name; fractions are of 1."""
    modules = sources()
    known = importers(modules)
    lines = [line for text in modules.values() for line in text.splitlines()]
    nodes = [node for text in modules.values() for node in ast.walk(ast.parse(text))]
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    ours = [name for name in modules if not is_entry(name)]
    small = [name for name in ours if len(modules[name].splitlines()) < SMALL]
    return {
        "files that are no entries of a registry": len(ours),
        "of them under 60 lines with a single importer": sum(
            len(known[name]) == 1 for name in small
        ),
        "longest file, lines": max(len(text.splitlines()) for text in modules.values()),
        "longest function, lines": max(one.end_lineno - one.lineno + 1 for one in functions),
        "functions that take the whole Config": sum(map(takes_config, functions)),
        "comment lines": sum(map(num_comment_lines, modules.values())) / len(lines),
        "lines over 100 columns": sum(len(line) > COLUMNS for line in lines) / len(lines),
        "double assignments": sum(map(is_double, assignments)) / len(assignments),
    }


def table(values: dict[str, float]) -> str:
    """Returns the measures as rows of a Markdown table."""
    shown = {
        name: f"{value:.1%}" if isinstance(value, float) else f"{value:,}"
        for name, value in values.items()
    }
    return "\n".join(
        [
            "| measure | now |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in shown.items()),
        ]
    )


if __name__ == "__main__":
    print(table(measure()))
