"""VQA accuracy: how many of ten people gave this answer."""

import re
from collections.abc import Sequence

ENOUGH = 3
"""People who make an answer fully right."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
CONTRACTIONS = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
""",
)
SPELLINGS = {
    word[:at] + word[at + 1 :]: word
    for word in CONTRACTIONS
    for at, letter in enumerate(word)
    if letter == "'"
}
"""A contraction that lacks one of its apostrophes, and how it is spelled."""


def normalize(text: str) -> str:
    """The standard normaliser of VQA answers, as EvalAI has it for TextVQA: lower case, no articles
    and punctuation, digits for number words up to ten, apostrophes in contractions.

    Quirks, all kept:
      - a mark of punctuation becomes nothing where one of its kind stands at a space, else a space:
        "a/b" is "a b", of which the article leaves: "b";
      - commas are removed, so "1,000" is "1000", and "none" is "0";
      - "'s" is parted from its word, so "who's" never equals "whos", which becomes "who's";
      - periods before a digit stay (".5"), so do all after the first 32 others.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    spaced = text.replace("\n", " ").replace("\t", " ").strip()
    text = spaced
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", text, count=MAX_PERIODS).split())
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy: min(1, people who gave this answer / 3), averaged over leaving out one of the
    people.

    `answers` are those of all people, repetitions included. Quirks:
      - of ten people two are worth 0.6, three 0.9, and four are needed for 1.0;
      - both sides go through `normalize`, always (the code of VQA v2 leaves answers alone where all
        people agree);
      - a single answer, where it is all that the data have, is worth 1.0: leaving it out would
        leave nothing.

    Raises:
      ValueError: `answers` is empty.
    """
    if not answers:
        raise ValueError("no answers")
    normal = normalize(prediction)
    count = len(answers)
    agree = sum(normalize(answer) == normal for answer in answers)
    if count == 1:
        return float(agree)
    left_out = min(1, (agree - 1) / ENOUGH) if agree else 0.0
    return (agree * left_out + (count - agree) * min(1, agree / ENOUGH)) / count
