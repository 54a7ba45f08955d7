"""Makes the cases of olmocr_cases.json: pages and tests of them, and what the reference says.

Not part of the tests. In a scratch environment with rapidfuzz, fuzzysearch, beautifulsoup4 and tqdm,
and a checkout of the reference beside it: `python make_olmocr_cases.py CHECKOUT > olmocr_cases.json`.
The pages are made here.
"""

import itertools
import json
import random
import sys
import types

WORDS = [
    *(
        "the",
        "total",
        "of",
        "all",
        "parts",
        "was",
        "not",
        "“quoted”",
        "words",
        "in",
        "old",
        "scans",
    ),
    *("it’s", "naïve", "cafe\u0301", "—", "1,234.50", "kg", "−", "5 %", "(see § 3)", "re-used"),
    *("snake_case_name", "**bold**", "*slanted*", "\u00b5m"),
]
CELLS = ("Year", "Total", "Total, net", "12.50", "12,50", "1 234", "a", "", "**Mean**", "n/a", "Q1")
NAMES = (
    *("alpha", "bravo", "carbon", "delta", "exit", "foxtrot"),
    *("gulf", "hotel", "jury", "kilo", "mint", "nectar"),
)
"""Cells of which no two are half alike, so that each test is of one."""
_HEADED = (
    "<table><thead><tr><td>alpha</td></tr><tr><td>bravo</td></tr></thead>"
    "<tr><td>carbon</td></tr><tr><td>delta</td></tr></table>"
)
_OVERLAPPING = (
    '<table><tr><td>alpha</td><td rowspan="3">bravo</td><td>carbon</td></tr>'
    '<tr><td colspan="2">delta</td><td>exit</td></tr>'
    "<tr><td>gulf</td><td>hotel</td><td>jury</td></tr></table>"
)
_HANGING = (
    '<table><tr><td>alpha</td><td rowspan="4">bravo</td><td>carbon</td></tr>'
    '<tr><td colspan="3">delta</td></tr></table>'
)
RARE = (
    (_HEADED, "table", ({"cell": "delta", "top_heading": name} for name in ("alpha", "bravo"))),
    (_HEADED, "table", ({"cell": "delta", "up": name} for name in ("bravo", "carbon"))),
    (_OVERLAPPING, "table", ({"cell": "hotel", "up": name} for name in ("bravo", "delta"))),
    (_OVERLAPPING, "table", ({"cell": "jury", "left": name} for name in ("bravo", "hotel"))),
    (_OVERLAPPING, "table", ({"cell": "exit", "right": "gulf"}, {"cell": "gulf", "up": "delta"})),
    (_HANGING, "table", ({"cell": "alpha", "down": "delta"}, {"cell": "delta"})),
    ("5 \u00b5m of x＿y and “z”", "present", ({"text": t} for t in ("5 μm", "x_y a", 'd "z"'))),
)
"""What pages made at random have too seldom."""
KINDS = ("present", "absent", "order", "table", "baseline")


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def typos(rng: random.Random, words: str, count: int) -> str:
    """A text with some characters replaced, left out or doubled."""
    for _ in range(count):
        at = rng.randrange(len(words) or 1)
        words = words[:at] + rng.choice(["", "x", words[at : at + 1] * 2]) + words[at + 1 :]
    return words


def marked(rng: random.Random, words: str) -> str:
    """A text with markup and odd spaces here and there."""
    parts = words.split(" ")
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(parts))
        form = rng.choice(
            ["**{}**", "__{}__", "<b>{}</b>", "*{}*", "{}<br>", "{}\n", "<i>{}</i>\t"]
        )
        parts[at] = form.format(parts[at])
    return " ".join(parts)


def markdown_table(rng: random.Random) -> str:
    pool = rng.choice([CELLS, NAMES])
    rows = [rng.choices(pool, k=rng.randint(1, 4)) for _ in range(rng.randint(1, 5))]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if rng.random() < 0.8:
        lines.insert(1, "|" + "---|" * len(rows[0]))
    if rng.random() < 0.3:
        lines = [line.strip("|") for line in lines]
    return "\n".join(lines)


def html_table(rng: random.Random) -> str:
    pool = rng.choice([CELLS, NAMES, NAMES])

    def cell() -> str:
        tag = rng.choice(["td", "td", "th"])
        spans = "".join(
            f' {name}="{rng.choice(["2", "3", "0", "x", ""])}"'
            for name in ("rowspan", "colspan")
            if rng.random() < 0.25
        )
        end = "" if rng.random() < 0.05 else f"</{tag}>"
        inner = rng.choice(["", "", "<br>more"]) if rng.random() < 0.95 else html_table(rng)
        return f"<{tag}{spans}>{rng.choice(pool)}{inner}{end}"

    rows = [
        "<tr>" + "".join(cell() for _ in range(rng.randint(0, 4))) + "</tr>"
        for _ in range(rng.randint(1, 5))
    ]
    if rng.random() < 0.4:
        rows[0] = f"<thead>{rows[0]}</thead>"
    return f"<table>{''.join(rows)}</table>"


def page(rng: random.Random) -> str:
    parts = [marked(rng, text(rng, rng.randint(1, 25))) for _ in range(rng.randint(0, 3))]
    parts += [rng.choice([markdown_table, html_table])(rng) for _ in range(rng.randint(0, 2))]
    rng.shuffle(parts)
    ends = ["", "", "\n", "ab" * rng.choice([3, 29, 31, 40]), " .", "漢字", "🙂", "![image](a.png)"]
    return "\n\n".join(parts) + rng.choice(ends)


def test(rng: random.Random, kind: str, content: str) -> dict:
    """A test of a type, of what stands on the page or nearly."""
    words = content.split() or ["nothing"]

    def piece(longest: int) -> str:
        at = rng.randrange(len(words))
        found = " ".join(words[at : at + rng.randint(1, longest)])
        # Without the marks that the page has.
        for mark in ("**", "__", "<b>", "</b>", "<i>", "</i>", "*") if rng.random() < 0.5 else ():
            found = found.replace(mark, "")
        return typos(rng, found, rng.choice([0, 0, 1, 2, 4])) or "x"

    fields: dict = {"type": kind, "max_diffs": rng.choice([0, 0, 1, 2, 5])}
    if kind in ("present", "absent"):
        fields["text"] = piece(12)
        fields |= {"case_sensitive": False} if rng.random() < 0.3 else {}
        fields["text"] = fields["text"].upper() if rng.random() < 0.1 else fields["text"]
        for name in ("first_n", "last_n"):
            fields |= {name: rng.choice([0, 10, 40, 200])} if rng.random() < 0.2 else {}
    elif kind == "order":
        fields |= {"before": piece(5), "after": piece(5)}
        fields["max_diffs"] = min(
            fields["max_diffs"], len(fields["before"]) // 2, len(fields["after"]) // 2
        )
    elif kind == "table":
        pool = NAMES if any(name in content for name in NAMES) else CELLS
        fields["cell"] = rng.choice(pool)
        sides = ("up", "down", "left", "right", "top_heading", "left_heading")
        fields |= {
            side: rng.choice(pool) for side in rng.sample(sides, rng.choice([0, 1, 1, 1, 2]))
        }
        fields |= {"ignore_markdown_tables": True} if rng.random() < 0.1 else {}
    else:
        fields.pop("max_diffs")
        fields |= {"max_length": rng.choice([0, 5, 100])} if rng.random() < 0.3 else {}
        fields |= {"max_length_skips_image_alt_tags": True} if rng.random() < 0.3 else {}
        fields |= {"max_repeats": 2} if rng.random() < 0.2 else {}
        fields |= {"check_disallowed_characters": False} if rng.random() < 0.2 else {}
    return fields


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    # The one module that draws formulas needs a browser, and no test here has any.
    drawing = types.ModuleType("olmocr.bench.katex.render")
    drawing.compare_rendered_equations = drawing.render_equation = None
    sys.modules |= {"olmocr.bench.katex": types.ModuleType("katex"), drawing.__name__: drawing}
    from olmocr.bench.tests import load_single_test
    from olmocr.version import VERSION

    def passes(fields: dict, content: str) -> bool | None:
        """What the reference says; None for a test that it refuses."""
        try:
            loaded = load_single_test(fields)
        except Exception:
            return None
        try:
            return loaded.run(content)[0]
        except Exception:
            return False  # As its runner counts it.

    rng = random.Random(15)
    pages = []
    # Half of all answers should be yes: a scorer that always says no would pass on the others.
    wanted = dict.fromkeys(itertools.product(KINDS, (True, False)), 60)
    wanted |= {("table", True): 150, ("table", False): 150}
    for content, kind, tests in RARE:
        found = []
        for fields in tests:
            fields = {"type": kind, **fields}
            found.append(
                [fields, passes({"pdf": "a.pdf", "page": 1, "id": "a", **fields}, content)]
            )
        pages.append([content, found])
    while any(wanted.values()):
        content = page(rng)
        found = []
        for kind in KINDS * 3:
            fields = test(rng, kind, content)
            passed = passes({"pdf": "a.pdf", "page": 1, "id": "a", **fields}, content)
            if wanted.get((kind, passed)):
                wanted[kind, passed] -= 1
                found.append([fields, passed])
        if found:
            pages.append([content, found])
    reference = f"allenai/olmocr {VERSION}, commit f7cfe4c22098b154c76b6ec950d1c0a464eecf8d"
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in pages)
    print(f'{{"reference": {json.dumps(reference)}, "pages": [\n{lines}\n]}}')


if __name__ == "__main__":
    main()
