"""Old names of fields, values and metrics, and their present ones.

Stored files (`config.json`, checkpoints, `metrics.jsonl`) are read under either name. A config file
or a flag with an old name is refused, with a message that has the new one: nobody should need this
table to understand a config.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

FIELDS = {
    "model.vocab_form": "model.vocab_impl",
    "model.vocab_block_mib": "model.chunk_size_mib",
    "data.row_length": "data.seq_len",
    "data.loss_by": "data.loss_normalisation",
    "data.labelled_share": "data.labelled_fraction",
    "train.accumulation": "train.grad_accum_steps",
    "train.visual_input": "train.visual_source",
    "train.validation_rows": "train.validation_sequences",
}
"""Present paths of a stage's fields, by their old paths."""

VALUES = {
    "model.vocab_impl": {"blockwise": "chunked"},
    "data.packing": {"plan": "offline"},
    "train.visual_source": {"labels": "oracle"},
}
"""Present values of fields, by the field's present path and the old value."""

BEFORE = {"data.full_cover": 0.125, "data.min_token_height": 0.0, "data.min_contrast": 0}
"""What fields that came later stood for before, where that is not their default: a run goes on with
the patch labels that it began with."""

METRICS = {"fill": "packing_efficiency"}
"""Present names of metrics, by their old names."""

POSITION = {"next_row": "next_sequence"}
"""Present names in a checkpoint's position in the data, by their old names."""


def hint(path: str) -> str:
    """Returns the end of a message on the unknown field `path`: its present name, or "" where no
    field ever had that name."""
    # stages.NAME.GROUP.FIELD, or GROUP.FIELD.
    stage_path = path.split(".", 2)[2] if path.startswith("stages.") else path
    new = FIELDS.get(stage_path)
    return f": it is called config.{path.removesuffix(stage_path)}{new} now" if new else ""


def value_hint(path: str, value: Any) -> str:
    """Returns the end of a message on an unknown value of the field `path`: its present name, or ""
    where the field never had that value."""
    new = VALUES.get(path, {}).get(value) if isinstance(value, str) else None
    return f": it is called {new!r} now" if new else ""


def names(fields: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """Returns `fields` under their present names in `table`, in the same order."""
    return {table.get(name, name): value for name, value in fields.items()}


def is_from_before(stages: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether stored stages have the old names of fields."""
    places = [name.split(".") for name in FIELDS]
    return any(name in stage.get(group, {}) for stage in stages for group, name in places)


def stage(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a stage of a stored config under their present names, with present
    values; one line of the log names those that changed."""
    changed = []
    current = dict(fields)
    for group in {path.partition(".")[0] for path in (*FIELDS, *VALUES)}:
        if not isinstance(fields.get(group), Mapping):
            continue  # Damaged: the reader names it.
        current[group] = {}
        for name, value in fields[group].items():
            path = FIELDS.get(f"{group}.{name}", f"{group}.{name}")
            new = VALUES.get(path, {}).get(value, value) if isinstance(value, str) else value
            current[group][path.partition(".")[2]] = new
            if path != f"{group}.{name}" or new != value:
                values = f" {value!r}", f" {new!r}"
                old_value, new_value = values if new != value else ("", "")
                changed.append(f"{group}.{name}{old_value} as {path}{new_value}")
    for path, value in BEFORE.items():
        group, _, name = path.partition(".")
        if isinstance(current.get(group), Mapping):
            current[group].setdefault(name, value)
    if changed:
        text = ", ".join(sorted(changed))
        logging.log_first_n(logging.WARNING, "a config of an earlier version is read: %s", 1, text)
    return current
