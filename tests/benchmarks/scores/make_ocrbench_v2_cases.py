"""Makes the cases of ocrbench_v2_cases.json: questions, predictions, and what the reference says.

Not part of the tests. In a scratch environment with what the reference's requirements.txt names, and
its OCRBench_v2 beside it: `python make_ocrbench_v2_cases.py OCRBench_v2 > ocrbench_v2_cases.json`.
The questions are made here.
"""

import contextlib
import io
import json
import random
import sys
import tempfile

COUNT = 24
"""Cases of each type and way."""
WORDS = ["the", "Total", "of", "12.50", "net", "in", "2024", "A", "b,", "Ünit", "x = 3", "\n", " "]
SIGNS = list("合计金额日期,, 12年月\nA")
ASKED = ("", "multiple choice", "case sensitive")
WAYS = {
    "text recognition en": ASKED,
    "document classification en": ASKED,
    "cognition VQA en": ASKED,
    "diagram QA en": ASKED,
    "reasoning VQA en": ASKED,
    "science QA en": ASKED,
    "APP agent en": ASKED,
    "ASCII art classification en": ASKED,
    "math QA en": ASKED,
    "text counting en": ("exact match", "regression"),
    "key information extraction en": ("",),
    "key information mapping en": ("",),
    "formula recognition en": ("",),
    "cognition VQA cn": ASKED,
    "reasoning VQA cn": ASKED,
    "key information extraction cn": ("",),
    "handwritten answer extraction cn": ("",),
    "formula recognition cn": ("",),
}


def text(rng: random.Random, pool: list[str], most: int = 9) -> str:
    # Parts with commas between are what words are elsewhere.
    gap = rng.choice(["", ","]) if pool is SIGNS else " "
    return gap.join(rng.choices(pool, k=rng.randint(1, most)))


def near(rng: random.Random, answer: str, pool: list[str]) -> str:
    """A prediction that is the answer, holds it, resembles it, or is another."""
    at = rng.randrange(len(answer) + 1)
    return rng.choice(
        [
            answer,
            answer.upper(),
            f"{text(rng, pool, 3)} {answer} {text(rng, pool, 3)}",
            answer[:at] + "x" + answer[at:],
            answer[: at // 2],
            answer.replace(" ", "  "),
            text(rng, pool),
            "",
        ]
    )


def dictionary(rng: random.Random, values: list) -> dict:
    return {
        rng.choice(["date", "Total ", "name", "company", "合计"]): rng.choice(values)
        for _ in range(rng.randint(1, 4))
    }


def fields_case(rng: random.Random, kind: str) -> tuple[str, str]:
    """Wanted fields in one of the forms of the set, and a prediction of them in one of a model's."""
    values = ["2024-01-02", "12.50", "Old Town", "", ["a b", "A.B."], ["12.50"], "合 计"]
    found = dictionary(rng, values)
    answer = repr(found)
    if not kind.endswith("cn"):
        empty = json.dumps(found | {"note": None})
        answer = rng.choice([answer, json.dumps(found), empty, f'"{found}"', f'"{empty}"', "?"])
    known = {
        key: (value[0] if isinstance(value, list) else value)
        for key, value in found.items()
        if rng.random() < 0.8
    }
    if rng.random() < 0.5:
        known |= dictionary(rng, ["2024-01-02", "12.5", "OLD  town", 12.5, None])
    return answer, written(rng, known)


def written(rng: random.Random, known: dict) -> str:
    """Fields as a model may write them."""
    lines = "\n".join(f"{key}: {value}" for key, value in known.items())
    plain = json.dumps(known)
    return rng.choice(
        [
            plain,
            repr(known),
            f"```json\n{json.dumps(known, indent=1)}\n```",
            f"Here it is:\n```\n{plain}\n```\nDone.",
            lines,
            f"{{{lines}",
            ", ".join(f"'{key}' = '{value}'" for key, value in known.items()),
            plain[:-2],
            rng.choice(
                [
                    "[1, 2]",
                    "null",
                    "12",
                    "('a', 1)",
                    "{1: 2}",
                    "",
                    "no fields",
                    '"a: b"',
                    "[1, a: 2]",
                ]
            ),
        ]
    )


def case(rng: random.Random, kind: str, way: str) -> tuple[list[str], str]:
    """The answers to a question, and a prediction."""
    pool = SIGNS if kind.endswith("cn") else WORDS
    if way == "multiple choice":
        answer = rng.choice(["A", "BD", "c"])
        return [answer], rng.choice(
            [answer, f"{answer}.", f"({answer})\n", f"It is {answer}", "B", ""]
        )
    if kind == "text counting en":
        number = str(rng.randint(0, 12))
        said = rng.choice(
            [
                number,
                str(int(number) * 3 // 2),
                f"{rng.randint(0, 14)}",
                f"about {rng.randint(0, 30)} of 3",
                "none",
                "",
            ]
        )
        return [number] * rng.choice([1, 2]) + ["4"] * rng.choice([0, 1]), said
    if kind.startswith("key information"):
        (answer, prediction) = fields_case(rng, kind)
        return [answer], prediction
    if kind.startswith("formula"):
        answer = rng.choice([r"x ^ 2 + \text{ if } y", r"\frac{a}{b}", "E = m c", r"\text {no}"])
        pool = [answer, answer.replace(" ", ""), r"\text{ if }", "x^2+ if y", "$", r"\[", "= 3"]
        return [answer], "".join(rng.choices(pool, k=rng.randint(0, 4)))
    if kind.startswith("handwritten"):
        answer = rng.choice(["A", "BCD", "对错", "AB"])
        return [answer], rng.choice([", ", "、", ";", "", "-", " 和"]).join(
            rng.choice([answer, "BCD", "x"])
        )
    answers = [text(rng, pool) for _ in range(rng.choice([1, 1, 2, 3]))]
    return answers, near(rng, rng.choice(answers), pool)


def main() -> None:
    sys.path.insert(0, f"{sys.argv[1]}/eval_scripts")
    with contextlib.redirect_stdout(io.StringIO()):
        from eval import process_predictions

    def score(item: dict) -> float:
        with tempfile.NamedTemporaryFile("w+") as asked, tempfile.NamedTemporaryFile("w+") as rated:
            json.dump([item], asked)
            asked.flush()
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                process_predictions(asked.name, rated.name)
            return json.load(rated)[0]["score"]

    rng = random.Random(15)
    cases = []
    for kind, ways in WAYS.items():
        for way in ways:
            for _ in range(COUNT):
                answers, prediction = case(rng, kind, way)
                item = {"type": kind, "question": "?", "answers": answers, "predict": prediction}
                item |= {"eval": way} if way else {}
                source = f"{kind}/{way}" if way else kind
                cases.append([source, answers, prediction, score(item)])
    reference = "Yuliang-Liu/MultimodalOCR, commit 794c36d6423cf1d5764081128bcaeb46b240def6"
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in cases)
    print(f'{{"reference": {json.dumps(reference)}, "cases": [\n{lines}\n]}}')


if __name__ == "__main__":
    main()
