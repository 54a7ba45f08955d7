"""`inspect`: what a prepared folder holds, in numbers and as a page of the rows that a model would get."""

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alignvlm_jax import presets
from alignvlm_jax.commands import config_flag
from alignvlm_jax.commands.arguments import positive
from alignvlm_jax.config import Config, DataConfig, LLMConfig, ModelConfig
from alignvlm_jax.data import statistics, tokenizer_files
from alignvlm_jax.data.pipeline import TrainRows
from alignvlm_jax.data.statistics import Statistics
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.eval import rows_page


def main(argv: list[str]) -> None:
    """Prints the statistics and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m alignvlm_jax inspect",
        description=__doc__,
        epilog=f"Without --config rows are those of SigLIP-400M with tiles of 384 pixels, 16,384 tokens long. "
        f"{config_flag.HELP}",
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="folder that `prepare` wrote; default: that of the config")
    parser.add_argument("--split", default="train")
    parser.add_argument("--stage", default="", help="of several in the config; default: the first")
    parser.add_argument("--num_rows", type=positive, default=8, help="rows on the page")
    parser.add_argument("--out", type=Path, help="the page; default: rows.html in the folder")
    stages, rest = config_flag.parse(argv)
    args = parser.parse_args(rest)
    if stages is None and not args.data:
        parser.error("--data=DIR or --config=FILE is required")
    config = _default(args.data) if stages is None else _stage(stages, args.stage)
    if args.data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=args.data, sources={}))
    rows = TrainRows(config, args.split)
    first = rows.schedule.epoch_end() if config.data.packing == "plan" else 0
    fill = rows.schedule.counters(first)["fill"] if first else None
    found = [statistics.collect(config, folder, args.split, fill) for folder in config.data.folders]
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    for one in found:
        _print(console, one)
    views = [
        rows_page.view(rows[i], i, rows.names(i), config, rows.tokenizer) for i in range(min(args.num_rows, len(rows)))
    ]
    out = args.out or Path(config.data.folders[0], rows_page.FILE)
    print(f"Written: {rows_page.build(views, found[0], out)}")
