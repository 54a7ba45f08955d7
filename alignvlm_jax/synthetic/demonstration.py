"""The demonstration's data set: rendered documents of every split, and a tokenizer trained on
them."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.data import record as record_lib
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError, how_to_install
from alignvlm_jax.synthetic import documents, fonts
from alignvlm_jax.synthetic.drawn import Draw, DrawnSet

TOKENIZER_DOCUMENTS = 2000


def data_set(arguments: dict[str, Any]) -> DrawnSet:
    """Returns the data set; `arguments` are num_train and num_eval (documents of a split), seed and
    noise."""
    sizes = {
        split: arguments["num_eval" if spec.evaluation else "num_train"]
        for split, spec in documents.SPLITS.items()
    }
    # The version is part of what identifies the data, so that records of older code are not reused.
    description = arguments | {"version": documents.VERSION}

    def open_renderer() -> Draw:
        check_packages("the demonstration's documents", ("pandas", "statsmodels", "vega_datasets"))
        # Imported here: pandas takes seconds to import, and the workers do not need it.
        from alignvlm_jax.synthetic import tables

        return functools.partial(
            documents.render, arguments["seed"], tables=tables.load(), noise=arguments["noise"]
        )

    return DrawnSet(sizes, description, open_renderer, _train_tokenizer)


def check_packages(what: str, others: Sequence[str] = ()) -> None:
    """Raises UserError unless all fonts' packages and `others` are installed, which `what` need: a
    missing font would otherwise show only in a worker."""
    packages = [*others, *sorted(fonts.PACKAGES)]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{what} need package {', '.join(missing)}: {how_to_install('demo', 'setup')}"
        )


def _train_tokenizer(folder: Path) -> None:
    records = RecordSource(folder, "train")
    SentencePieceTokenizer.train(
        folder / "tokenizer.model",
        (
            text
            for index in range(min(TOKENIZER_DOCUMENTS, len(records)))
            for text in _texts(records[index])
        ),
    )


def _texts(record: record_lib.Record) -> list[str]:
    lines = [" ".join(word.text for word in line) for page in record.lines for line in page]
    return lines + [turn.question for turn in record.turns]
