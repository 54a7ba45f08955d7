"""The runs of `make align-wins`: in which settings ALIGN beats other connectors, and by what.

ALIGN, ALIGN with patch labels, MLP and Ovis in settings that differ from the paper's one at a time,
named SETTING/CONNECTOR_seedN. They begin with the towers, towers/VOCABULARY, from which the others
start. The vision encoder is one and the same everywhere.

    vocabulary_N   the language model has N vocabulary entries, 128 (the demonstration's) to 49,152.
                   The tokenizer stays: entries beyond its own are never written. They are drawn at
                   the scale of the others, and the language model learns, in the towers, not to say
                   them. So texts, patches and questions are equal in all, and what is tested is
                   the size alone: how flat ALIGN starts, how many embeddings span its hull. What
                   larger tokens would change is not.
    steps_x3       128 entries, and three times the steps: whether others catch up
    random_llm_x3  128 entries, three times the steps, and a language model that is initialised: the
                   encoder alone is pretrained. In fewer steps it would not begin to answer

    configs/sweeps/align_wins.py         everything
    configs/sweeps/align_wins.py:short   a few steps of one seed in every setting, to see that all
                                         train; into another folder

The largest vocabulary, half of the time, comes last; before it, each seed is whole before the next.
Listed, it says how long it takes by the steps that were measured on 2 cores.
"""

import sys
from collections.abc import Iterator, Sequence

from alignvlm_jax.configs.sweeps import compare

from alignvlm_jax.errors import UserError, nearest

TOWERS = "{workdir}/towers"
CONNECTORS = {
    name: compare.CONNECTORS[name] for name in ("align", "align_supervised", "mlp", "ovis")
}
VOCABULARIES = (128, 1024, 8192, 49152)
NUM_STEPS = 500
LLM_OF_ITS_OWN = {"stages.read.train.load": "vision/.*"}
# The vocabulary of each setting, its steps as a multiple, and what else it changes.
SETTINGS = {
    **{f"vocabulary_{size}": (size, 1, {}) for size in VOCABULARIES},
    "steps_x3": (128, 3, {}),
    "random_llm_x3": (128, 3, LLM_OF_ITS_OWN),
}
TEXT_STEPS = {"stage0_lines": 1000, "stage0_pages": 600}
ENCODER_STEPS = {"stage1": 3500}
SHORT_STEPS = 4
SHORT = {"train.batch_size": 2, "train.validation_sequences": 2, "eval.num_questions": 8}
# Seconds of a step by vocabulary, of the towers' stages and of a connector with both towers, on 2
# cores. Measured are those of 128 entries, of 8,192 with a connector, and of 49,152 with MLP (1.3);
# the others are made of these by the arithmetic of the vocabulary.
SECONDS = {128: (0.1, 0.13), 1024: (0.11, 0.15), 8192: (0.24, 0.41), 49152: (0.97, 1.6)}


def sweep(form: str = "whole") -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields (name, config, changed fields) of every run.

    Args:
      form: "whole", or "short" to see that every setting trains.

    Raises:
      UserError: there is no such form.
    """
    forms = ("whole", "short")
    if form not in forms:
        raise UserError(f"there is no form {form!r} of the sweep{nearest(form, forms)}")
    is_short = form == "short"
    runs = []
    for sizes in (VOCABULARIES[:-1], VOCABULARIES[-1:]):
        runs += [_tower(size, is_short) for size in sizes]
        runs += _settings(sizes, is_short)
    seconds = sum(_seconds(name, fields) for name, _, fields in runs)
    print(f"{len(runs)} runs, about {seconds / 60:,.0f} min of steps on 2 cores", file=sys.stderr)
    yield from runs


def _tower(size: int, is_short: bool) -> tuple[str, str, dict[str, object]]:
    """Returns the run that trains both towers or, beside the encoder of that one, an LLM."""
    is_first = size == VOCABULARIES[0]
    steps = TEXT_STEPS | ENCODER_STEPS if is_first else TEXT_STEPS
    fields = {f"stages.{stage}.train.num_steps": number for stage, number in steps.items()}
    if is_short:
        fields = dict.fromkeys(fields, SHORT_STEPS) | SHORT
    if not is_first:
        fields["init_from"] = f"{TOWERS}/{VOCABULARIES[0]}"
    part = "towers" if is_first else "language_model"
    return f"towers/{size}", f"configs/compare.py:{part}", fields | _vocabulary(size)


def _settings(sizes: Sequence[int], is_short: bool) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields the runs of the settings with a vocabulary of one of these sizes, seed by seed."""
    settings = {name: setting for name, setting in SETTINGS.items() if setting[0] in sizes}
    for seed in compare.SEEDS[:1] if is_short else compare.SEEDS:
        for setting, (size, times, changes) in settings.items():
            steps = times * (SHORT_STEPS if is_short else NUM_STEPS)
            common = {
                "init_from": f"{TOWERS}/{size}",
                "stages.read.train.num_steps": steps,
                # In-training generation evals at a fifth of the run, as in the comparison.
                "stages.read.train.generate_every": 0 if is_short else steps // 5,
                # Whether a connector reads at all: of faces and layouts the demonstration tells.
                "eval.splits": "('seen_fonts',)",
                "seed": seed,
            }
            if is_short:
                common |= SHORT
            for connector, own in CONNECTORS.items():
                fields = {**own, **common, **changes, **_vocabulary(size)}
                yield f"{setting}/{connector}_seed{seed}", "configs/compare.py:connectors", fields


def _vocabulary(size: int) -> dict[str, object]:
    """Returns the fields of a vocabulary's size; Ovis has as large a visual one, as released."""
    return {
        "model.llm.vocab_size": size,
        "model.connectors.ovis.visual_vocab_size": size,
    }


def _seconds(name: str, fields: dict[str, object]) -> float:
    of_towers, of_connectors = SECONDS[fields["model.llm.vocab_size"]]
    steps = sum(value for field, value in fields.items() if field.endswith("num_steps"))
    return steps * (of_towers if name.startswith("towers/") else of_connectors)
