"""What a checkpoint costs a planned run, whether a stop leaves time for one, and what is lost where
it does not."""

import dataclasses
import math

from alignvlm_jax.config import TrainConfig

GRACE_SECONDS = {"GKE JobSet": 600, "xpk": 600, "TPU VM": 600, "Slurm": 600, "spot notice": 30}
"""Seconds from the wish to stop to the kill: the launch scripts' default --grace, and what a spot
machine is given, whatever a script asks for."""

HOST_WRITE_GB = 0.5
"""GB/s that a host writes to a bucket or a shared disk: an assumption on the safe side, printed
with what follows."""


@dataclasses.dataclass(frozen=True)
class Stopping:
    """What a checkpoint, a stop and a loss cost; times in seconds.

    A stop is noticed when the step under way ends; every host saves its part of the state.
    """

    state_gib: float
    gib_a_host: float
    step: float
    save: float
    interval: float

    @property
    def needed(self) -> float:
        """The time from the wish to stop to a checkpoint that is whole."""
        return self.step + self.save

    @property
    def lost_on_average(self) -> float:
        """The work that a run loses on average where it ends without notice: half an interval, and
        what was still being saved."""
        return self.interval / 2 + self.save

    @property
    def lost_at_most(self) -> float:
        return self.interval + self.save

    @property
    def in_time(self) -> dict[str, bool]:
        """Whether each grace period is long enough."""
        return {name: self.needed <= seconds for name, seconds in GRACE_SECONDS.items()}


def make(train: TrainConfig, state_gib: float, num_hosts: int, step_seconds: float) -> Stopping:
    """Returns what stops mean for a state of so many GiB, written evenly by all hosts, with steps
    so long."""
    gib_a_host = state_gib / num_hosts
    steps = train.checkpoint_every
    if train.checkpoint_minutes:
        # A checkpoint is due at the first step that ends after so many minutes.
        steps = min(steps, max(math.ceil(train.checkpoint_minutes * 60 / step_seconds), 1))
    return Stopping(
        state_gib=state_gib,
        gib_a_host=gib_a_host,
        step=step_seconds,
        # GiB are 2^30 bytes, GB 10^9.
        save=gib_a_host * 2**30 / (HOST_WRITE_GB * 1e9),
        interval=steps * step_seconds,
    )


def lines(stopping: Stopping) -> list[str]:
    """Returns the costs as people read them."""
    return [
        f"a checkpoint       {stopping.state_gib:.2f} GiB, {stopping.gib_a_host:.2f} a host: "
        f"{stopping.save:.0f} s at an assumed {HOST_WRITE_GB} GB/s a host",
        f"a stop             a step of {stopping.step:.1f} s and a save need "
        f"{stopping.needed:.0f} s: {_verdict(stopping)}",
        f"a loss of a host   costs {_minutes(stopping.lost_on_average)} of work on average, "
        f"{_minutes(stopping.lost_at_most)} at most: a checkpoint every "
        f"{_minutes(stopping.interval)}",
    ]


def _verdict(stopping: Stopping) -> str:
    parts = []
    for wanted, verdict in ((True, "in time for"), (False, "TOO LATE for")):
        names: dict[int, list[str]] = {}
        for name, is_in_time in stopping.in_time.items():
            if is_in_time is wanted:
                names.setdefault(GRACE_SECONDS[name], []).append(name)
        if names:
            groups = [f"{', '.join(of_one)} ({seconds} s)" for seconds, of_one in names.items()]
            parts.append(f"{verdict} {' and '.join(groups)}")
    if not all(stopping.in_time[name] for name in GRACE_SECONDS if name != "spot notice"):
        # A fifth more than is needed, since both times are estimates.
        parts.append(f"launch with --grace={math.ceil(1.2 * stopping.needed)}")
    return "; ".join(parts)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
