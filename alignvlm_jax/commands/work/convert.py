"""What `convert` does once its flags are read."""

import argparse
import functools
from pathlib import Path

from rich.console import Console

from alignvlm_jax import storage
from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import chat_template, tokenizers
from alignvlm_jax.errors import counted
from alignvlm_jax.weights import initial, published, towers


def write_export(
    checkpoint: Path, out: Path, components: tuple[str, ...], layout: str, with_adapter: bool
) -> None:
    """Writes components of a checkpoint in published formats, and prints how many tensors each
    has."""
    console = Console(highlight=False, soft_wrap=True)
    counts = published.write_export(checkpoint, out, components, layout, with_adapter=with_adapter)
    for component, count in counts.items():
        console.print(
            f"{out / component if layout == 'components' else component}: {count} tensors"
        )
    if layout == "transformers":
        console.print(
            f"Written: {out}; AutoModelForCausalLM.from_pretrained('{out}', trust_remote_code=True)"
            " loads it",
            markup=False,
        )


def write_exported(source: Path, out: Path) -> None:
    """Writes an exported model as a checkpoint."""
    console = Console(highlight=False, soft_wrap=True)
    config = initial.write_import(source, out)
    console.print(f"{source}: run {config.run_id or config.name}, stage {config.stage}")
    console.print(f"Written: {out}; start a run from it with --config.init_from={out}")


def _about_lengths(data: DataConfig, known: int) -> str:
    """Returns a line about the length of sequences, and what sets it: the context length of the
    language model, 0 where that is not known."""
    tiles = counted(data.max_tiles, "tile")
    why = f"; the language model was published for {known:,}" if 0 < known < initial.SEQ_LEN else ""
    return f"Sequences of {data.seq_len:,} tokens, with pages of up to {tiles}{why}"


def write_import(args: argparse.Namespace) -> None:
    """Writes a checkpoint of published weights, and prints what was loaded and what was not."""
    console = Console(highlight=False, soft_wrap=True)
    # First of all: a name that is taken should not be found after the weights were read.
    storage.refuse_existing(args.out)
    vision = towers.open_vision(args.vision, args.tile_size)
    llm = towers.open_llm(args.llm)
    config = initial.make_config(llm, vision, args.connector, args.out)
    console.print(f"{llm.source.name} and {vision.source.name}: connector {args.connector}")
    if llm.note:
        console.print(llm.note, markup=False)
    console.print(_about_lengths(config.data, config.model.llm.context_length), markup=False)
    write_tokenizer = functools.partial(towers.write, args.tokenizer or args.llm)
    console.print(initial.write(llm, vision, config, write_tokenizer, args.out))
    # Read back from what was written, which is what training and generation will read.
    chat_format = chat_template.format_of(tokenizers.load(args.out / initial.TOKENIZER))
    example = chat_format.spell([("QUESTION", "ANSWER")])
    console.print(f"Chats are written {example!r}", markup=False)
    console.print(f"Written: {args.out}; start a run from it with --config.init_from={args.out}")
