"""Which records an epoch has, of several sources."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from alignvlm_jax.config import Config, SourceConfig


def counts(
    sizes: Mapping[str, int], sources: Mapping[str, SourceConfig], temperature: float
) -> dict[str, int]:
    """Returns how many records an epoch takes of each source of so many records.

    Together they are as many as the sources with a weight have, times their repeats, less what caps
    take away. A source's share goes as weight * (size * repeat) ** (1 / temperature); with a weight
    above 0 it is never empty.
    """
    names = [name for name in sizes if sizes[name] and sources[name].weight]
    weights = np.array([sources[name].weight for name in names])
    repeated = np.array([sizes[name] * sources[name].repeat for name in names])
    # Less the largest, twice: at a low temperature powers overflow.
    logs = np.log(repeated)
    with np.errstate(over="ignore"):
        logs = np.log(weights) + (logs - logs.max(initial=-np.inf)) / temperature
    fractions = np.exp(logs - logs.max(initial=-np.inf))
    wanted = dict.fromkeys(sizes, 0)
    for name, fraction in zip(names, fractions / fractions.sum(), strict=True):
        count = max(1, round(repeated.sum() * fraction))
        wanted[name] = min(count, sources[name].cap or count)
    return wanted


def epoch_of(size: int, count: int, name: str, seed: Sequence[int], epoch: int) -> np.ndarray:
    """Returns the records, int64 [count], that an epoch takes of a source of `size` records.

    They are the next `count` of an endless stream that shuffles the source anew whenever it has
    gone through: over epochs no record is seen again before every other was seen.
    """
    if not count:
        return np.zeros(0, np.int64)
    begin = epoch * count
    end = (epoch + 1) * count
    # Of its name and not its place: a source that is added or left out does not change the others.
    seed = [*seed, zlib.crc32(name.encode())]
    rounds = range(begin // size, -(-end // size))
    stream = np.concatenate(
        [np.random.default_rng([*seed, number]).permutation(size) for number in rounds]
    )
    return stream[begin % size : begin % size + count]


def task_fractions(config: Config) -> tuple[list[str], np.ndarray]:
    """Returns the tasks that have a weight, and their fractions of all."""
    # Sorted: the order of the config's mapping must not decide which record gets which task.
    tasks = sorted(task for task, weight in config.data.tasks.items() if weight)
    weights = np.array([config.data.tasks[task] for task in tasks])
    return tasks, weights / weights.sum()
