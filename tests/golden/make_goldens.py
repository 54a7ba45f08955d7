"""What the reference implementations compute for the folders of tests/weights/folders.py, as small
.npz files.

make .venv-parity/.done && .venv-parity/bin/python -m tests.golden.make_goldens
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.parity import reference
from tests.weights import folders

HERE = Path(__file__).parent


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        save_llms("llama", folders.LLAMAS, scratch, rng)
        pixels = rng.integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
        for name, options in {"siglip": {}, "siglip2_naflex": {"is_naflex": True}}.items():
            folder = folders.write_siglip(Path(scratch, name), **options)
            np.savez(
                HERE / f"{name}.npz",
                pixels=pixels,
                hidden=reference.siglip_features(folder, pixels),
            )
        folder = folders.write_dinov2(Path(scratch, "dinov2"))
        for size in (24, 36):
            pixels = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
            np.savez(
                HERE / f"dinov2_{size}.npz",
                pixels=pixels,
                hidden=reference.dinov2_features(folder, pixels),
            )
        # Last: what is drawn before is what it was before there were any.
        save_llms("qwen", folders.QWENS, scratch, rng)
        save_llms("other", folders.OTHERS, scratch, rng)
        for size in (18, 36):
            pixels = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
            folder = folders.write_siglip(Path(scratch, f"naflex{size}"), is_naflex=True)
            np.savez(
                HERE / f"siglip2_naflex_{size}.npz",
                pixels=pixels,
                hidden=reference.siglip_features(folder, pixels),
            )


def save_llms(name: str, variants: Sequence, scratch: str, rng: np.random.Generator) -> None:
    """Writes NAME_I.npz of each variant: token ids [2, 40] and the logits of its class."""
    for number, variant in enumerate(variants):
        # Beyond the 16 positions that the scaled ones were trained on.
        tokens = rng.integers(0, folders.LLAMA["vocab_size"], (2, 40))
        folder = folders.write_llama(Path(scratch, f"{name}{number}"), variant)
        logits = reference.llm_logits(folder, tokens)
        np.savez(HERE / f"{name}_{number}.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
