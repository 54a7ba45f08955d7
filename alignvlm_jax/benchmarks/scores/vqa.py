"""VQA accuracy, which counts how many of ten people gave an answer."""

import re
from collections.abc import Sequence

ENOUGH = 3
"""Number of people whose agreement makes an answer fully right."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
PERIOD = re.compile(r"\.(?!\d)")
# The reference passes the flag re.UNICODE, which is 32, where re.sub takes the count.
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
# The reference has a table of these spellings, which follows from the list of contractions.
SPELLINGS = {
    word[:at] + word[at + 1 :]: word
    for word in CONTRACTIONS
    for at, letter in enumerate(word)
    if letter == "'"
}
"""The correct spelling of each contraction that lacks one of its apostrophes."""


def normalize(text: str) -> str:
    """Returns an answer as the standard normaliser of VQA has it, in EvalAI's version for TextVQA.

    It has lower case, no articles and punctuation, digits for number words up to ten, and
    apostrophes in contractions.

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
        # Decided by the whole text, not by each place: one "- " removes all hyphens.
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", text, count=MAX_PERIODS).split())
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns the VQA accuracy of a prediction (Antol et al. 2015, arXiv 1505.00468).

    It is min(1, number of people who gave this answer / 3), averaged over the subsets of people
    that leave out one.

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
    # The subsets are of two kinds: `agree` of them leave out a person who agrees.
    left_out = min(1, (agree - 1) / ENOUGH) if agree else 0.0
    return (agree * left_out + (count - agree) * min(1, agree / ENOUGH)) / count
