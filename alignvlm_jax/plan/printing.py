"""A plan as people read it."""

from alignvlm_jax.errors import how_to_install
from alignvlm_jax.plan import hardware, search, stopping, timing
from alignvlm_jax.plan.aot import GIB, Plan
from alignvlm_jax.plan.hardware import Topology

ESTIMATE = (
    "ESTIMATE: libtpu is not installed, so CPU's compiler stood in for the TPU's. Its memory is "
    "an upper bound (no flash attention) and its collectives are others; "
    f"{how_to_install('tpu', 'tpu-compiler')}"
)


def text(plan: Plan) -> str:
    """Returns what is needed, part by part, and what to change where it does not fit."""
    config = plan.config
    chip = plan.topology.chip
    train = config.train
    data = config.data
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    total = sum(plan.flops.values())
    # Of TPU7x a device is half a chip, and what follows "a chip" would be twice too large.
    one = "chip" if chip.num_devices == 1 else "device"
    devices = "" if chip.num_devices == 1 else f" of {chip.num_devices} devices"
    lines = [
        f"{config.name} {config.stage} on {plan.topology.name}: {plan.topology.num_chips} "
        f"chips{devices}, mesh {mesh}",
        f"batch {train.batch_size} sequences of {data.seq_len} tokens and {data.max_tiles} tiles, "
        f"in {train.grad_accum_steps} microbatches, remat {config.model.remat}, gradients of "
        f"kernels summed in {train.grad_reduce_dtype}",
        "",
        f"parameters         {plan.num_params:,}, of which {plan.num_trained:,} trained",
        f"{f'parameters a {one}':18} {plan.param_gib:.2f} GiB, optimizer {plan.optimizer_gib:.2f} "
        "GiB",
        *_on_host(plan, one),
        f"{f'peak HBM a {one}':18} {gib(plan.peak_hbm_gib)} of {chip.hbm_gib} GiB: {verdict(plan)}",
        "",
        *_table(
            [("FLOPs a step", "TFLOP", "fraction")]
            + [
                (component, _number(value / 1e12), f"{value / total:.0%}")
                for component, value in plan.flops.items()
            ]
            + [("all", _number(total / 1e12), "")]
        ),
        "",
        *_table(
            [("collectives a step", "count", f"GiB a {one}")]
            + [
                (kind, f"{communication.count:,}", f"{communication.bytes / GIB:.2f}")
                for kind, communication in plan.communication.items()
            ]
        ),
        "",
        *_seconds(plan),
        "",
        *stopping.lines(plan.stopping()),
    ]
    if not plan.fits:
        lines += ["", _way_out(plan), f"does not fit: {advice(plan)}"]
    if plan.is_estimate:
        lines += ["", ESTIMATE]
    return "\n".join(lines)


def _on_host(plan: Plan, one: str) -> list[str]:
    """What lies in the memory of the host, if anything does."""
    if not plan.host_gib:
        return []
    return [
        f"{f'on the host a {one}':18} {plan.host_gib:.2f} GiB of optimizer, sent there and back "
        "each step: in no seconds below"
    ]


def _seconds(plan: Plan) -> list[str]:
    """The seconds of a step by what they are spent on, and what all steps come to."""
    steps = plan.config.train.num_steps
    stage = (
        f"{f'{steps:,} steps':18} {plan.days:.1f} days, {_number(plan.chip_hours)} chip-hours, at "
        f"{plan.step_seconds:.3g} s a step: MFU {plan.mfu:.1%}"
    )
    cost = []
    if plan.cost is not None:
        cost = [
            f"{'cost':18} {plan.cost:,.2f} for the stage, {plan.cost / steps:,.4g} a step, at "
            f"{plan.price_per_chip_hour:g} a chip-hour"
        ]
    found = plan.timing
    if found is None:
        return [f"{stage}, which is assumed", _padding(plan), _input(plan), *cost]
    spent = {timing.NAMES[part]: seconds for part, seconds in found.computing.items()}
    spent["collectives not overlapped"] = found.exposed
    if found.network:
        spent["network not overlapped"] = found.network_exposed
    rows = [("seconds a step", "s", "fraction")]
    rows += [(what, f"{s:.3f}", f"{s / found.step:.0%}") for what, s in spent.items()]
    return [
        *_table([*rows, ("all", f"{found.step:.3f}", "")]),
        "",
        f"of these attention kernels take {found.attention:.3f} s, at an assumed "
        f"{timing.KERNEL_UTILISATION:.0%} of the peak; links are in use for {found.sent:.3f} s",
        stage,
        _padding(plan),
        _input(plan),
        *cost,
    ]


def _input(plan: Plan) -> str:
    """What the hosts have to read for the chips not to wait."""
    data = plan.config.data
    a_host = plan.config.train.batch_size / plan.topology.num_hosts / plan.step_seconds
    return (
        f"{'input':18} {a_host:.3g} sequences a second a host, {a_host * data.max_tiles:.3g} "
        f"tiles, on {data.num_threads} threads (data.num_threads) beside the step"
    )


def _padding(plan: Plan) -> str:
    """How much of what is computed is padding."""
    data = plan.config.data
    if plan.used is None:
        where = ", ".join(str(folder) for folder in data.folders)
        return (
            f"{'padding':18} not known without the stage's data and index in {where}; MFU counts it"
        )
    return (
        f"{'padding':18} {1 - plan.used.tokens:.0%} of the tokens and {1 - plan.used.tiles:.0%} of "
        f"the tiles, with packing {data.packing!r}: useful MFU {plan.useful_mfu:.1%}"
    )


def _way_out(plan: Plan) -> str:
    """What would fit, as flags, not compiled."""
    found = search.would_fit(plan)
    if found is None:
        return f"nothing looks as if it would fit, on no {plan.topology.kind} slice"
    topology, one = found
    mesh = one.mesh
    return (
        f"would fit, by a rough idea: --topology={topology.shape} "
        f"--mesh={mesh.data}x{mesh.fsdp}x{mesh.tensor} "
        f"--config.train.grad_accum_steps={one.grad_accum_steps} "
        f"--config.model.remat={one.remat} --config.model.chunk_size_mib={one.chunk_size_mib:g}"
    )


def advice(plan: Plan) -> str:
    """Returns what to change so that less memory is needed, the cheapest first."""
    config = plan.config
    data_parallel_size = plan.mesh["data"] * plan.mesh["fsdp"]
    rows = config.train.batch_size // config.train.grad_accum_steps // data_parallel_size
    changes = []
    if config.model.remat != "full":
        changes.append("--config.model.remat=full")
    if rows > 1:
        changes.append(
            f"--config.train.grad_accum_steps={config.train.batch_size // data_parallel_size} "
            f"(now {rows} sequences at a time)"
        )
    changes.append("--mesh=auto, which tries others")
    if name := larger(plan.topology):
        changes.append(f"--topology={name}")
    return "; ".join(changes)


def verdict(plan: Plan) -> str:
    """Returns whether a plan fits, and by how much."""
    limit = plan.topology.chip.hbm_gib
    if plan.peak_hbm_gib is None:
        return "too much"
    if plan.fits:
        return f"fits, {limit - plan.peak_hbm_gib:.2f} left"
    return f"{plan.peak_hbm_gib - limit:.2f} too much"


def gib(value: float | None) -> str:
    """Returns a size as it is shown."""
    return "unknown" if value is None else f"{value:.2f} GiB"


def larger(topology: Topology) -> str:
    """Returns the next larger slice of the kind, "" for the largest."""
    return next(
        (
            other.shape
            for other in hardware.at_least(topology)
            if other.num_chips > topology.num_chips
        ),
        "",
    )


def _number(value: float) -> str:
    """Returns a number to the nearest one, a small one to three digits: that of a tiny model is not
    shown as 0."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
