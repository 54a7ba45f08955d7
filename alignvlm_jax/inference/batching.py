"""Continuous batching: many prompts of any length are answered in the rows of one batch, and a row
that has its answer takes the next prompt."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignvlm_jax.data import chat, loader
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError, counted
from alignvlm_jax.inference import buckets
from alignvlm_jax.inference import decoding as decoding_lib
from alignvlm_jax.inference.buckets import Bucket
from alignvlm_jax.inference.decoding import GREEDY, Decoding
from alignvlm_jax.inference.sampler import Sampler
from alignvlm_jax.parallel import exchange

PREFILL_TOKENS = 1024
"""Tokens of the prompts that a device reads at once, about: enough for large matmuls."""
PREFILLS_PER_BATCH = 8
"""A prefill has at most one such part of a batch's rows: so many have to be free for it."""
REPORTS_PER_BATCH = 8
"""Where no prompt waits, answers are handed out whenever one such part of the rows has ended: those
of a single batch would all come at its end, minutes without a word."""
PATIENCE = 2
"""Queues of later prompts that may be read before one whose bucket few others have."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts that are built shortly before their turn comes: a page is decoded by the process that
    measures its prompt, and by those that feed its row, not on all hosts.

    Attributes:
      count: how many there are.
      builder: whose they are.
      build: returns the prompt of a number from 0; UserError where it cannot be built.
      length: the most tokens that any of them has.
      longest_context: `Config.longest_context`, which prompt and answer have to share.
      skips_problems: whether those that cannot be built are left out, with the reason as their
        answer; else the error is raised.
    """

    count: int
    builder: ExampleBuilder
    build: Callable[[int], PackedSequence]
    length: int
    longest_context: int
    skips_problems: bool = False


class Answer(NamedTuple):
    """What the model says, or "" and why it could not be asked.

    `is_cut` where it had not come to its end.
    """

    text: str
    problem: str | None = None
    is_cut: bool = False


def answer(
    sampler: Sampler,
    variables: Mapping,
    tokenizer: Tokenizer,
    prompts: Prompts,
    size: int,
    max_new_tokens: int,
    decoding: Decoding = GREEDY,
) -> Iterator[Answer]:
    """Yields the answers to all prompts, in order; at most `size` are in the making at a time.

    An answer depends on its own prompt alone: on no other, nor on their order. Of several processes
    all call this, and each gets all answers.

    Raises:
      UserError: a prompt cannot be built or is too long, see `check_context`, and `prompts` skips
        none.
    """
    queue = _Queue(prompts, size, max_new_tokens)
    rows = _Rows(sampler, variables, prompts, size, max_new_tokens, decoding)
    # What is shorter than the longest is filled up.
    ends = {tokenizer.pad_id, *chat.stop_ids(tokenizer)}
    problems: dict[int, str] = {}
    found: dict[int, np.ndarray] = {}
    for number in range(prompts.count):
        while number not in found and number not in problems:
            queue.read()
            rows.fill(queue)
            rows.advance(queue)
            # While the devices are at work.
            queue.read()
            found |= rows.take_finished()
            problems |= queue.take_problems()
        if number in problems:
            yield Answer("", problems.pop(number))
            continue
        tokens_T = found.pop(number)
        yield Answer(tokenizer.decode(tokens_T), is_cut=int(tokens_T[-1]) not in ends)


class _Queue:
    """Prompts that wait, in order; the same on all processes, each of which has built some."""

    def __init__(self, prompts: Prompts, size: int, num_new: int) -> None:
        self._prompts = prompts
        self._num_new = num_new
        # Of two batches: rows are filled with those of one, and others still wait for the first row
        # that ends.
        self._size = 2 * size
        self._next = 0
        self._buckets: dict[int, Bucket] = {}
        self._built: dict[int, PackedSequence] = {}
        self._problems: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def read(self) -> None:
        """Fills the queue up. Of several processes each measures some of the new prompts, and tells
        the others: all decide on the same."""
        while self._next < self._prompts.count and len(self) < self._size:
            end = min(self._next + self._size - len(self), self._prompts.count)
            numbers = range(self._next, end)
            self._next = end
            extents, problems = self._measure(numbers[jax.process_index() :: jax.process_count()])
            # A collective: all processes come here, with problems or without, or the others wait
            # for ever. Keys are texts, since JSON has no others.
            told = exchange.gather([{str(n): e for n, e in extents.items()}, problems])
            known = {int(n): extent for of_one, _ in told for n, extent in of_one.items()}
            self._problems |= {int(n): why for _, of_one in told for n, why in of_one.items()}
            if self._problems and not self._prompts.skips_problems:
                raise UserError(self._problems[min(self._problems)])
            most_tiles = self._prompts.builder.data.tiles_of_a_record
            for number in sorted(known):
                self._buckets[number] = buckets.of_extent(
                    *known[number], self._prompts.length, most_tiles
                )

    def _measure(self, numbers: Sequence[int]) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
        """Tokens and tiles of these prompts, and why some could not be built."""
        extents = {}
        problems = {}
        for number in numbers:
            try:
                built = self._prompts.build(number)
                extent = self._prompts.builder.extent([built], multiple=1)
                check_context(extent[0], self._num_new, self._prompts.longest_context)
            except UserError as err:
                problems[number] = str(err)
                continue
            extents[number] = extent
            # Of several processes another may feed it, which builds it again.
            self._built[number] = built
        return extents, problems

    def take_problems(self) -> dict[int, str]:
        """Returns why prompts could not be built, once."""
        problems = self._problems
        self._problems = {}
        return problems

    def next(self) -> tuple[Bucket, list[int]]:
        """Returns the bucket that is due, and the prompts of it, the oldest first."""
        oldest, bucket = next(iter(self._buckets.items()))
        # Full prefills cost less a prompt. But none is passed over for ever: answers are handed out
        # in order.
        if self._next - oldest <= PATIENCE * self._size:
            [(bucket, _)] = collections.Counter(self._buckets.values()).most_common(1)
        return bucket, [number for number, other in self._buckets.items() if other == bucket]

    def take(self, numbers: Sequence[int]) -> None:
        """Takes prompts that no longer wait."""
        for number in numbers:
            del self._buckets[number]

    def built(self, numbers: Sequence[int], bucket: Bucket) -> list[PackedSequence]:
        """Returns prompts that were taken, some repeated maybe, in their bucket's shape."""
        made = {
            number: self._built.get(number) or self._prompts.build(number)
            for number in dict.fromkeys(numbers)
        }
        return [buckets.fit(made[number], bucket) for number in numbers]

    def forget(self, numbers: Sequence[int]) -> None:
        """Lets go of prompts that were put into rows."""
        for number in numbers:
            self._built.pop(number, None)


class _Rows:
    """The rows of a batch, and the prompts that they answer."""

    def __init__(
        self,
        sampler: Sampler,
        variables: Mapping,
        prompts: Prompts,
        size: int,
        max_new_tokens: int,
        decoding: Decoding,
    ) -> None:
        self._sampler = sampler
        self._variables = variables
        self._decoding = decoding
        self._size = size
        self._num_new = max_new_tokens
        self._num_devices = sampler.data_parallel_size
        self._per_device = size // self._num_devices
        self._free = set(range(size))
        self._numbers: dict[int, int] = {}
        self._state = sampler.idle(
            size, prompts.length, max_new_tokens, is_greedy=decoding.is_greedy
        )

    def fill(self, queue: _Queue) -> None:
        """Puts prompts that wait into free rows, where there are enough of both for a prefill."""
        while len(self._free) >= self._least(queue):
            bucket, waiting = queue.next()
            size = self._prefill_size(bucket)
            # Fewer than that, where free rows are on few devices, or few prompts wait.
            places = self._places(size)[: len(waiting)]
            numbers = waiting[: len(places)]
            queue.take(numbers)
            # What is left of the batch repeats a prompt, and goes nowhere.
            of_batch = np.full(size, numbers[0])
            rows = np.full(size, self._size)
            for number, (place, row) in zip(numbers, places, strict=True):
                of_batch[place] = number
                rows[place] = row
                self._numbers[row] = number
            # Only what is known on all processes has been used up to here: they decide alike.
            self._free -= set(self._numbers)
            built = queue.built(of_batch[self._sampler.rows_of_process(size)].tolist(), bucket)
            queue.forget(numbers)
            batch = loader.stack(built)
            if not self._decoding.is_greedy:
                batch |= decoding_lib.arrays([self._decoding] * len(built))
            self._state = self._sampler.insert(self._variables, self._state, batch, rows)

    def _prefill_size(self, bucket: Bucket) -> int:
        return prefill_size(self._size, bucket.length, self._num_devices)

    def _least(self, queue: _Queue) -> int:
        """How many rows have to be free for those that wait next: one prefill of many costs less
        than many of one. More than there are where none waits."""
        if not len(queue):
            return self._size + 1
        bucket, waiting = queue.next()
        return min(self._prefill_size(bucket), len(waiting))

    def _places(self, size: int) -> list[tuple[int, int]]:
        """Places in a prefill of `size` prompts, with the free rows that they go to: each on its
        own device, and devices in turns."""
        per_prefill = size // self._num_devices
        used = collections.Counter()
        places = []
        for row in sorted(self._free, key=lambda row: (row % self._per_device, row)):
            device = row // self._per_device
            if used[device] < per_prefill:
                places.append((device * per_prefill + used[device], row))
                used[device] += 1
        return places

    def advance(self, queue: _Queue) -> None:
        """Sets the devices to work until enough rows are free for prompts that wait; if none does,
        until as many answers more have ended as are worth telling of."""
        if len(queue):
            num_working = max(self._size - self._least(queue), 0)
        else:
            num_working = max(len(self._numbers) - -(-self._size // REPORTS_PER_BATCH), 0)
        self._state = self._sampler.advance(
            self._variables, self._state, self._num_new, num_working
        )

    def take_finished(self) -> dict[int, np.ndarray]:
        """Returns the prompts whose answers have ended, with their tokens; their rows are free."""
        # Read once, and by all processes alike: what follows is decided by this alone.
        is_finished = np.asarray(self._state.finished_B)
        done = [row for row in self._numbers if is_finished[row]]
        # Trap: on CPU this is the device's own memory, which the next call is given to write to.
        tokens_BT = np.array(self._state.tokens_BT)
        self._free.update(done)
        return {self._numbers.pop(row): tokens_BT[row] for row in done}


def check_context(num_prompt: int, num_new: int, longest: int) -> None:
    """Raises where prompt and answer are longer than what the language model knows.

    Beyond that it has seen no position: what it says there is made up, and nothing shows it.

    Args:
      num_prompt: tokens of the prompt.
      num_new: tokens of the answer at most.
      longest: `Config.longest_context`.

    Raises:
      UserError: they are.
    """
    if longest and num_prompt + num_new > longest:
        room = longest - num_prompt
        advice = f"allow at most {counted(room, 'new token')}" if room > 0 else "shorten the prompt"
        raise UserError(
            f"the prompt has {counted(num_prompt, 'token')} and its answer up to {num_new:,}, and "
            f"the language model knows texts of up to {longest:,}; {advice}"
        )


def prefill_size(size: int, length: int, data_parallel_size: int) -> int:
    """Returns the rows of the batches that prompts of so many tokens are read in, beside the `size`
    rows that they are put into: of the bucket alone, so that it has one program."""
    most = size // data_parallel_size // PREFILLS_PER_BATCH
    return max(min(most, PREFILL_TOKENS // length), 1) * data_parallel_size


def batch_size(count: int, most: int, data_parallel_size: int) -> int:
    """Returns the rows of a batch for `count` prompts, `most` or a few more: each of the devices
    that rows are spread over needs as many."""
    # Rounded up, by -(-a // b): 3 prompts over 8 devices make 8 rows, and 20 of at most 12 make 16.
    return -(-min(count, max(most, data_parallel_size)) // data_parallel_size) * data_parallel_size
