"""What answering the questions of an evaluation needs on a machine that is not there: the real
programs of continuous batching, which read prompts and make tokens, compiled for a TPU slice, at
the longest prompts to expect of a stage."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alignvlm_jax.config import Config, MeshConfig, ModelConfig
from alignvlm_jax.inference import batching, sampler
from alignvlm_jax.inference.sampler import Sampler
from alignvlm_jax.models import vlm
from alignvlm_jax.models.decoder import Llama
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import aot, printing
from alignvlm_jax.plan.hardware import Topology
from alignvlm_jax.train import state


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """Generation on a slice: bytes are those of one device.

    `batch_size` is `eval.batch_size`, rounded up to the mesh; of these prompts `prefill_size` are
    read at once, and each has `prompt_length` tokens. `peak_hbm_gib` is that of the program that
    needs more, None where the compiler gave up without a number; `is_estimate` where it was not the
    TPU's.
    """

    topology: Topology
    config: Config
    mesh: dict[str, int]
    batch_size: int
    prefill_size: int
    prompt_length: int
    num_params: int
    param_gib: float
    cache_gib: float
    peak_hbm_gib: float | None
    fits: bool
    is_estimate: bool

    @property
    def prompts_per_device(self) -> int:
        """Prompts of a batch that one device answers, together with the others of its `tensor`
        axis."""
        return self.batch_size // (self.mesh["data"] * self.mesh["fsdp"])

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain values."""
        config = self.config
        return {
            "config": config.name,
            "stage": config.stage,
            "topology": self.topology.name,
            "num_slices": self.topology.num_slices,
            "num_chips": self.topology.num_chips,
            "num_devices": self.topology.num_devices,
            "mesh": self.mesh,
            "batch_size": self.batch_size,
            "prefill_size": self.prefill_size,
            "prompt_length": self.prompt_length,
            "max_tiles": config.data.tiles_of_a_record,
            "max_new_tokens": config.eval.max_new_tokens,
            "fits": self.fits,
            "is_estimate": self.is_estimate,
            "peak_hbm_gib": self.peak_hbm_gib,
            "hbm_limit_gib": self.topology.chip.hbm_gib,
            "param_gib": self.param_gib,
            "cache_gib": self.cache_gib,
            "num_params": self.num_params,
        }


def on_mesh(mesh: MeshConfig, model: ModelConfig, topology: Topology) -> MeshConfig:
    """Returns the mesh with the sizes of all its axes on a slice; the batch of training means
    nothing here.

    Raises:
      UserError: no mesh that is asked for fits the devices and the model. Nothing is compiled.
    """
    mesh = aot.mesh_on(topology, mesh, model, None)
    devices = mesh_lib.abstract(mesh, model, None, topology.num_devices, topology.num_slices)
    # For what it raises, of a parameter that does not divide.
    state.abstract_params(vlm.VLM(model), devices)
    return mesh


def make(config: Config, topology: Topology, devices: Sequence[jax.Device]) -> GenerationPlan:
    """Compiles the generation of a config, whose mesh is one of `on_mesh`, for the devices of a
    slice, or for as many of another kind."""
    model = vlm.VLM(config.model)
    is_estimate = devices[0].platform != "tpu"
    mesh = mesh_lib.make_mesh(config.mesh, config.model, None, devices)
    most = config.eval.batch_size
    num_new = config.eval.max_new_tokens
    length = config.longest_prompt
    num_devices = mesh_lib.data_parallel_size(mesh)
    batch_size = batching.batch_size(most, most, num_devices)
    prefill_size = batching.prefill_size(batch_size, length, num_devices)
    params = state.abstract_params(model, mesh)
    # Which tokens end an answer does not change what the programs need.
    generating = Sampler(model, mesh, end_ids=(0,), pad_id=0)
    prompts = sampler.abstract_prompts(config, prefill_size, mesh)
    lowered = generating.lower_batching({"params": params}, prompts, batch_size, num_new)
    peaks = [aot.compile_program(one, is_estimate)[1] for one in lowered]
    peak_gib = None if None in peaks else max(peaks)
    return GenerationPlan(
        topology=topology,
        config=config,
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        prefill_size=prefill_size,
        prompt_length=length,
        num_params=sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        param_gib=aot.gib_of_a_device(params),
        cache_gib=_cache_gib(config.model, batch_size, length + num_new, mesh),
        peak_hbm_gib=peak_gib,
        fits=peak_gib is not None and peak_gib <= topology.chip.hbm_gib,
        is_estimate=is_estimate,
    )


def text(plan: GenerationPlan) -> str:
    """Returns what is needed, for each thing held, and what to change where it does not fit."""
    config = plan.config
    data = plan.config.data
    chip = plan.topology.chip
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{config.name} {config.stage}, generation on {plan.topology.name}: "
        f"{plan.topology.num_chips} chips, mesh {mesh}",
        f"batch {plan.batch_size} prompts of {plan.prompt_length} tokens and "
        f"{data.tiles_of_a_record} tiles, {plan.prompts_per_device} a device; "
        f"{config.eval.max_new_tokens} new tokens",
        f"{plan.prefill_size} prompts are read at a time, while the others are being answered",
        "",
        f"parameters           {plan.num_params:,}, float32",
        f"parameters a device  {plan.param_gib:.2f} GiB, keys and values {plan.cache_gib:.2f} GiB",
        f"peak HBM a device    {printing.gib(plan.peak_hbm_gib)} of {chip.hbm_gib} GiB: "
        f"{printing.verdict(plan)}",
    ]
    if not plan.fits:
        lines += ["", f"does not fit: {advice(plan)}"]
    if plan.is_estimate:
        lines += ["", printing.ESTIMATE]
    return "\n".join(lines)


def advice(plan: GenerationPlan) -> str:
    """Returns what to change so that less memory is needed, the cheapest first."""
    changes = []
    if plan.prompts_per_device > 1:
        smaller = plan.batch_size // plan.prompts_per_device * (plan.prompts_per_device // 2)
        changes.append(
            f"--config.eval.batch_size={smaller} (now {plan.prompts_per_device} prompts a device)"
        )
    changes.append("--mesh=DATAxFSDPxTENSOR with a larger FSDP or TENSOR")
    if name := printing.larger(plan.topology):
        changes.append(f"--topology={name}")
    return "; ".join(changes)


def _cache_gib(model: ModelConfig, batch_size: int, length: int, mesh: jax.sharding.Mesh) -> float:
    """GiB a device of the keys and values, both [L, B, K, h, S], S = `length`."""
    llm = Llama(model.llm, jnp.dtype(model.dtype), "none")
    # Rows are split over data and fsdp, and heads over tensor: all of the mesh together.
    cache = jax.eval_shape(lambda: llm.empty_cache(batch_size, length))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) / mesh.size / aot.GIB
