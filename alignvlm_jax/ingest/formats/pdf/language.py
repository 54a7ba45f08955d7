"""The language of a page, as far as questions can be asked in it."""

import collections
import re
import unicodedata

DEFAULT = "en"
"""The language of questions where that of a page is not known, or is none of ours."""
WORDS = {
    "en": "the of and to is in that for with are this be as from which can",
    "de": "der die das und ist nicht mit für ein eine den dem von wird sie auf zu",
    "fr": "le la les des et est une un dans pour que sur du pas vous avec ce",
    "es": "el la los las de una que del por para con es en se no puede su",
    "it": "il la di che della per una con è non sono del si le un nel",
    "pt": "o a os as um uma não para com é do da em que se no",
    "ca": "el la els les amb per una que del és no de i en es",
    "nl": "de het een van voor niet zijn met en is op dat te u",
    "ro": "și de la în cu pe este nu un o pentru sau care din",
    "sv": "och att det som är en på för med av inte den till kan",
    "da": "og at det som er en på for med af ikke den til kan",
    "id": "yang dan di untuk dengan dari ini pada tidak atau dapat",
}
"""Frequent words of languages; those that we do not ask in keep pages from a language alike."""
LATIN = ("en", "de", "fr", "es")
"""Languages of Latin script that questions are asked in."""
MIN_WORDS = 5
MIN_LEAD = 1.3
"""Fewest frequent words of a page in its language, and times as many as of the next one."""
MIN_FRACTION = 0.3
"""Smallest fraction of letters of another script than Latin from which a page is in it: manuals
have names and commands in Latin letters."""


def language(text: str) -> str:
    """Returns the language of a text by its script and words; DEFAULT if in doubt."""
    scripts: collections.Counter[str] = collections.Counter()
    # Names are slow, and a page has few different letters.
    for character, count in collections.Counter(text).items():
        if character.isalpha():
            scripts[unicodedata.name(character, "").partition(" ")[0]] += count
    num_letters = max(scripts.total(), 1)
    if scripts["CYRILLIC"] > MIN_FRACTION * num_letters:
        # Of the languages in Cyrillic, Russian has neither of these letters.
        return DEFAULT if re.search("[іїєђћџљњўқғ]", text.lower()) else "ru"
    # Japanese has Chinese characters too, between its own.
    if scripts["CJK"] > MIN_FRACTION * num_letters:
        is_japanese = scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.02 * num_letters
        return DEFAULT if is_japanese or scripts["HANGUL"] else "zh"
    # Words of two languages, as "de" and "la", count for both: the lead of the best one shrinks.
    found = collections.Counter(re.findall(r"\w+", text.lower()))
    counts = {name: sum(found[word] for word in words.split()) for name, words in WORDS.items()}
    best, second = sorted(counts, key=counts.get, reverse=True)[:2]
    is_clear = counts[best] >= MIN_WORDS and counts[best] >= MIN_LEAD * counts[second]
    return best if is_clear and best in LATIN else DEFAULT
