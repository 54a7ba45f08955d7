"""Relaxed accuracy of ChartQA: numbers may be off by 5 %."""

from collections.abc import Sequence

TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is within 5 % of one of the answers, both being numbers, or else equals it in all but
    case (ChartQA, arXiv 2203.10244, as pix2struct's code has it, which others copied).

    Quirks, all kept, for they move published numbers:
      - "105" for "100" is right, "105.01" is not; and so is "2019" for "2010": years are numbers too;
      - "5%" is 0.05: right for "0.05", wrong for "5";
      - an answer of zero is compared as a string: "0.0" for "0" is wrong;
      - "1,000" and "$10" are no numbers: wrong for "1000" and "10";
      - strings are not stripped, and "yes." for "yes" is wrong.

    Raises:
      ValueError: `answers` is empty.
    """
    return max(float(_is_close(prediction, answer)) for answer in answers)


def _is_close(prediction: str, answer: str) -> bool:
    predicted, wanted = _number(prediction), _number(answer)
    if predicted is None or not wanted:
        return prediction.lower() == answer.lower()
    return abs(predicted - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
