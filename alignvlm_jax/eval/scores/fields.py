"""F1 over the fields of a form: DeepForm, Kleister Charity."""

from collections.abc import Sequence

EMPTY = ("", "NONE")
"""How a document without the field is answered."""


def field_f1(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """What one field of a document adds to F1, as the evaluator of DUE counts: (2 x hits, values predicted + values
    wanted). The F1 of many fields is the ratio of the sums of both; it is not the mean of theirs.

    `answers` are spellings of one value. Quirks:
      - case does not matter, anything else does: "$1,200.00" for "1200.00" is wrong;
      - empty values and "None" are no values: (0, 0) where nothing is wanted and nothing predicted;
      - a wrong value is two mistakes, one predicted and one missed, a missing one is one: saying nothing is safer;
      - white space at the ends is stripped, which DUE leaves to whoever writes its files.

    Raises:
      ValueError: `answers` is empty; a field that is not in the document has the answer "None".
    """
    if not answers:
        raise ValueError("no answers")
    predicted, *wanted = (text.strip().upper() for text in (prediction, *answers))
    is_predicted, is_wanted = predicted not in EMPTY, any(value not in EMPTY for value in wanted)
    is_hit = is_predicted and predicted in wanted
    return 2.0 * is_hit, float(is_predicted + is_wanted)
