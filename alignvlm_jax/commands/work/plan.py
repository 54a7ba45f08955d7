"""What `plan` does once its flags are read."""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from alignvlm_jax.config import Config, MeshConfig
from alignvlm_jax.errors import UsageError, how_to_install, nearest
from alignvlm_jax.parallel import xla_flags
from alignvlm_jax.plan import aot, generation, hardware, padding, printing, search
from alignvlm_jax.plan.generation import GenerationPlan
from alignvlm_jax.plan.hardware import Topology
from alignvlm_jax.plan.search import Search


def run(stages: tuple[Config, ...], args: argparse.Namespace) -> bool:
    """Prints the plan of a stage; returns whether it fits.

    Raises:
      UserError: the stage cannot be planned as the flags ask.
    """
    make = _generation_plan if args.generate else _plan
    plan = make(_stage(stages, args.stage), args)
    if isinstance(plan, aot.Plan):
        config = plan.config
        plan = dataclasses.replace(
            plan,
            price_per_chip_hour=args.price_per_chip_hour,
            used=padding.used(config.data, config.model, config.tokens_per_tile),
        )
    print(json.dumps(plan.to_json(), indent=2) if args.json else _text(plan), flush=True)
    return plan.fits


def _text(plan: aot.Plan | GenerationPlan) -> str:
    return generation.text(plan) if isinstance(plan, GenerationPlan) else printing.text(plan)


def _generation_plan(config: Config, args: argparse.Namespace) -> GenerationPlan:
    """Returns the plan of a stage's generation on a slice."""
    jax.config.update("jax_platforms", "cpu")
    topology = hardware.parse_topology(args.topology, args.num_slices)
    if args.mesh:
        config = dataclasses.replace(config, mesh=_mesh(args.mesh))
    resolved = generation.on_mesh(config.mesh, config.model, topology)
    config = dataclasses.replace(config, mesh=resolved)
    # Standard output is for the plan alone, so that --json gives one object.
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    if hardware.has_tpu_compiler():
        say(xla_flags.set_flags(topology.kind, args.num_slices > 1))
    devices = _devices(topology)
    say(f"compiling generation of {config.name} {config.stage}")
    return generation.make(config, topology, devices)


def _plan(config: Config, args: argparse.Namespace) -> aot.Plan:
    """Returns the plan of a stage's training step on a slice, or on the smallest that fits."""
    # Compiling needs no accelerator, and that of this machine may be at work.
    jax.config.update("jax_platforms", "cpu")
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    kind, _, shape = args.topology.partition(":")
    if shape == "smallest":
        if not hardware.has_tpu_compiler():
            raise UsageError(
                f"--topology={args.topology} needs libtpu: {how_to_install('tpu', 'tpu-compiler')}"
            )
        say(xla_flags.set_flags(kind, several_slices=False))  # as a run there would be compiled
        return search.smallest(config, kind, hardware.compile_only_devices, say)
    topology = hardware.parse_topology(args.topology, args.num_slices)
    if args.mesh and args.mesh != "auto":
        config = dataclasses.replace(config, mesh=_mesh(args.mesh))
    candidates = Search(config, topology)
    # Before any device is made: how many there are is fixed by the first.
    if args.mesh == "auto":
        candidates.check()
    else:
        aot.check(config, topology)
    if hardware.has_tpu_compiler():
        say(xla_flags.set_flags(kind, args.num_slices > 1))
    devices = _devices(topology)
    if args.mesh == "auto":
        return candidates.best(devices, say)
    say(
        f"compiling {config.name} {config.stage}, batch {config.train.batch_size} x "
        f"{config.data.seq_len} tokens"
    )
    return aot.start(config, topology, devices)()


def _devices(topology: Topology) -> Sequence[jax.Device]:
    """Returns the devices of a topology: the TPU compiler's if it is installed, else CPUs."""
    if hardware.has_tpu_compiler():
        return hardware.compile_only_devices(topology)
    print(printing.ESTIMATE, file=sys.stderr, flush=True)
    # The environment may ask for another number of devices already, and the first request holds.
    os.environ["XLA_FLAGS"] = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
    )
    jax.config.update("jax_num_cpu_devices", topology.num_devices)
    return jax.devices()


def _stage(stages: tuple[Config, ...], name: str) -> Config:
    """Returns the stage of this name; "" is the only one."""
    by_name = {stage.stage: stage for stage in stages}
    if not name and len(stages) == 1:
        return stages[0]
    if name not in by_name:
        if name:
            raise UsageError(f"--stage is {name!r}{nearest(name, by_name)}")
        raise UsageError(
            f"the config has several stages: --stage=NAME, one of {', '.join(by_name)}"
        )
    return by_name[name]


def _mesh(text: str) -> MeshConfig:
    """Returns the mesh that DATAxFSDPxTENSOR describes."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise UsageError(f"--mesh is {text!r}; it must be auto or DATAxFSDPxTENSOR, such as 1x16x4")
    data, fsdp, tensor = map(int, text.split("x"))
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
