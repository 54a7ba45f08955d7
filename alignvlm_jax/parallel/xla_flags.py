"""Flags of the TPU's compiler, by kind of TPU.

This file imports no jax: the flags must be set before jax loads the compiler.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

SWITCH = "ALIGNVLM_XLA_PRESET"
VARIABLE = "LIBTPU_INIT_ARGS"

# Published practice (MaxText, benchmarks/xla_flags_library.py): gathers of fsdp's weights become
# asynchronous, and run on the links while the matrix units compute. Mostly defaults of today's
# compiler; named here, a run's log tells what it was compiled with.
_OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}

# Of the same list: gathers are cut into steps that are fused with what computes. On v5e alone:
# elsewhere the libtpu of jax 0.12 refuses it, and warns of wrong results and hangs.
_FUSION = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
}

# The same list's flags for gradients that are summed over the data-centre network: one layer's sum
# is under way while the next is computed. Only of use where `data` lies across slices.
_SLICES = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

PRESETS: Mapping[str, Mapping[str, str]] = {
    "v5e": _OVERLAP | _FUSION,
    "v5p": _OVERLAP,
    # A v6e core has 128 MiB of VMEM, of which a fusion gets 16 by default; 96 is MaxText's choice
    # for dense models.
    "v6e": _OVERLAP | {"xla_tpu_scoped_vmem_limit_kib": "98304"},
    "tpu7x": _OVERLAP,
}

# The beginnings of TPU_ACCELERATOR_TYPE (v5litepod-16, v5p-128, v6e-8, tpu7x-128), and the chips'
# ids on the PCI bus.
_TYPES = {"v5litepod": "v5e", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x"}
_PCI_IDS = {"0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
_PCI_VENDOR = "0x1ae0"
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def apply_preset(environment: MutableMapping[str, str] = os.environ) -> str:
    """Sets the flags of this machine's kind of TPU, and returns a line for the log that says so; ""
    where there is no TPU.

    Flags that the environment sets already keep their values; ALIGNVLM_XLA_PRESET=0 sets none. Call
    it before jax first looks for devices.
    """
    kind = tpu_kind(environment)
    if kind is None:
        return ""
    if kind not in PRESETS:
        return f"XLA flags: no preset for TPU {kind}; known: {', '.join(PRESETS)}"
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    return set_flags(kind, slices not in ("", "1"), environment)


def set_flags(
    kind: str, several_slices: bool, environment: MutableMapping[str, str] = os.environ
) -> str:
    """Sets the flags of a kind of TPU, which need not be this machine's, as `apply_preset` does.

    Args:
      kind: a key of `PRESETS`.
      several_slices: whether the run spans slices, whose gradients cross the data-centre network.
      environment: changed in place.
    """
    if environment.get(SWITCH) == "0":
        return f"XLA flags: preset of {kind} is off ({SWITCH}=0)"
    theirs = _flags(environment.get(VARIABLE, "")) | _flags(environment.get("XLA_FLAGS", ""))
    preset = {**PRESETS[kind], **(_SLICES if several_slices else {})}
    ours = [f"--{name}={value}" for name, value in preset.items() if name not in theirs]
    environment[VARIABLE] = " ".join([environment.get(VARIABLE, ""), *ours]).strip()
    kept = sorted(theirs & preset.keys())
    return (
        f"XLA flags: {VARIABLE} gets {' '.join(ours) or 'nothing'} (preset of {kind}, {SWITCH}=0 "
        "leaves it out)" + (f"; of the environment stay {', '.join(kept)}" if kept else "")
    )


def tpu_kind(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the kind of this machine's TPU, found in the environment (GKE) or on the PCI bus;
    None where there is none."""
    if named := environment.get("TPU_ACCELERATOR_TYPE", "").lower():
        return _TYPES.get(named.split("-")[0], named)
    for path in sorted(_PCI_DEVICES.glob("*/vendor")):
        if path.read_text().strip() == _PCI_VENDOR:
            device = (path.parent / "device").read_text().strip()
            if device in _PCI_IDS:
                return _PCI_IDS[device]
    return None


def _flags(text: str) -> set[str]:
    """Returns the names of the flags in a text, where --noNAME counts as NAME, too: a flag that was
    switched off must not be set again."""
    names = {word.lstrip("-").split("=")[0] for word in text.split()}
    return names | {name.removeprefix("no") for name in names}
