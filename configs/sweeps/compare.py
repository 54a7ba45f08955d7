"""The runs of `make compare`, named TABLE/ROW_seedN, with three seeds of each row.

The tables compare connectors, changes to single components of ALIGN, and weights of patch labels
for a vision encoder that is not pretrained.

Each connector has the learning rate that was better with seed 0, 1e-3 (the config's) or 2e-3
(docs/results.md); changes to ALIGN have that of ALIGN.
"""

from collections.abc import Iterator

from alignvlm_jax.errors import UserError, nearest

SEEDS = range(3)
CONNECTORS = {
    "align": {},
    "align_supervised": {"train.patch_token_weight": 1.0},
    "mlp": {"model.connector.name": "mlp", "optim.learning_rate": 2e-3},
    "perceiver": {"model.connector.name": "perceiver"},
    "ovis": {"model.connector.name": "ovis"},
    "h_reducer": {"model.connector.name": "h_reducer"},
    "c_abstractor": {"model.connector.name": "c_abstractor"},
}
ALIGN = {
    "without_ln2": {"model.connector.use_ln2": False},
    "ln2_gain_4": {"model.connector.ln2_gain_init": 4.0},
    "w2_random": {"model.connector.w2_init": "random"},
    "embeddings_stopped": {"model.connector.embed_grad": "stop"},
    "linear_span": {"model.connector.weights": "linear"},
}
SUPERVISION = {
    "weight_0": {},
    "weight_0.3": {"train.patch_token_weight": 0.3},
    "weight_1": {"train.patch_token_weight": 1.0},
    "weight_3": {"train.patch_token_weight": 3.0},
    "weight_1_labels_of_1_percent": {
        "train.patch_token_weight": 1.0,
        "data.labelled_fraction": 0.01,
    },
    "weight_1_labels_of_10_percent": {
        "train.patch_token_weight": 1.0,
        "data.labelled_fraction": 0.1,
    },
}
# The part of `configs/compare.py` that each table uses, and its rows.
TABLES = {
    "connectors": ("connectors", CONNECTORS),
    "parts_of_align": ("connectors", ALIGN),
    "supervision": ("supervision", SUPERVISION),
}


def sweep(tables: str = ",".join(TABLES)) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields (name, config, changed fields) of every run.

    Args:
      tables: names of the tables, separated by commas; default: all.

    Raises:
      UserError: there is no table of a name.
    """
    # All names are checked before the first run is yielded.
    for table in tables.split(","):
        if table not in TABLES:
            raise UserError(
                f"there is no table {table!r} of the comparison{nearest(table, TABLES)}"
            )
    for seed in SEEDS:
        for table in tables.split(","):
            part, changes = TABLES[table]
            for name, fields in changes.items():
                yield (
                    f"{table}/{name}_seed{seed}",
                    f"configs/compare.py:{part}",
                    {**fields, "seed": seed},
                )
