"""The terms of the field, and what is not written in their place (docs/architecture.md, "Terms")."""

import fnmatch
import io
import pathlib
import re
import tokenize
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).parents[2]
EVERYWHERE = ("alignvlm_jax/*", "configs/*", "README.md", "docs/*.md")
MODEL = ("alignvlm_jax/ops/*", "alignvlm_jax/models/*", "alignvlm_jax/plan/*")


PROSE = {
    tokenize.COMMENT,
    tokenize.STRING,
    # From Python 3.12 on a text with braces is several tokens.
    getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
}


class Term(NamedTuple):
    """A term, what is not written in its place (a regular expression, whatever the case), and in
    which files; in code alone, names but no prose."""

    use: str
    banned: str
    files: tuple[str, ...] = EVERYWHERE
    in_code_alone: bool = False


TERMS = (
    Term("seq_len", r"row_length"),
    Term("packed sequence", r"packed rows?|training rows?|planned rows?"),
    Term("image token", r"(image|tile) slots?|slots_per_tile|num_slots"),
    Term("microbatch", r"micro-batch(es)?|accumulation parts?"),
    Term("grad_accum_steps", r"(train\.)accumulation"),
    Term("offline packing", r"packing plans|plans? of (the )?rows"),
    Term("packing efficiency", r"\bfill of\b|rows? fill"),
    Term("chunked", r"blockwise|vocab_form|block_mib"),
    Term("loss_normalisation", r"loss_by"),
    Term("visual_source", r"visual_input"),
    Term("master", r"Matrix\.gradient"),
    Term("fraction", r"\bshares?\b (of|for)|labelled_share"),
    Term("fraction", r"(?<![a-z])shares?(?![a-z])", in_code_alone=True),
    Term("axis size", r"(?<![a-z])ways(?![a-z])", in_code_alone=True),
    Term("communication", r"\btraffic\b"),
    Term("perturbation", r"disturbances?"),
    Term("in-training generation eval", r"spot.?checks?|\baskers?\b"),
    Term(
        "generate, question", r"(?<![a-z])(asker|ask|asked|asks|said)(?![a-z])", in_code_alone=True
    ),
    Term("quarantine", r"\b(set|sets|setting|moved) aside\b"),
    Term("lens", r"(?<![a-z])(look|looks|looked|looking)(?![a-z])", in_code_alone=True),
    Term("special tokens", r"(?<![a-z])(specials|marks)(?![a-z])", in_code_alone=True),
    Term("matmul", r"\bproducts?\b", MODEL),
    Term("token, vocabulary entry", r"\bwords?\b", MODEL),
)


def names_and_prose(path: pathlib.Path) -> tuple[dict[int, str], dict[int, str]]:
    """Returns the lines of a file that are left without comments and texts, and those of these
    alone, by number; of a file that is not Python all is prose."""
    lines = path.read_text().splitlines()
    if path.suffix != ".py":
        return {}, dict(enumerate(lines, 1))
    names: dict[int, list[str]] = {}
    prose: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME or token.string == ".":
            names.setdefault(token.start[0], []).append(token.string)
        elif token.type in PROSE:
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                prose.setdefault(number, []).append(line)
    return (
        {number: " ".join(found).replace(" . ", ".") for number, found in names.items()},
        {number: " ".join(found) for number, found in prose.items()},
    )


def violations(paths: list[pathlib.Path], root: pathlib.Path = REPOSITORY) -> list[str]:
    """Returns for each banned word "FILE:LINE: `WORD`: write TERM"."""
    found = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        names, prose = names_and_prose(path)
        for term in TERMS:
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in term.files):
                continue
            kinds = [names] if term.in_code_alone else [names, prose]
            for number, line in sorted((n, text) for kind in kinds for n, text in kind.items()):
                for match in re.finditer(term.banned, line, re.IGNORECASE):
                    found.append(f"{name}:{number}: `{match[0]}`: write {term.use}")
    return found


def files() -> list[pathlib.Path]:
    """Returns what is held to the terms: the package, the configs and the guides."""
    patterns = ("alignvlm_jax/**/*.py", "alignvlm_jax/**/*.html", "configs/**/*.py", "docs/*.md")
    found = [path for pattern in patterns for path in REPOSITORY.glob(pattern)]
    # The table of old names is there to name them; results are of the day that they were measured.
    without = {REPOSITORY / "alignvlm_jax/config/renamed.py", REPOSITORY / "docs/results.md"}
    return sorted({*found, REPOSITORY / "README.md"} - without)


if __name__ == "__main__":
    print("\n".join(violations(files())))
