"""The bodies of requests: what is read of them at once has bounds, of each and of all together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from alignvlm_jax.serving import protocol
from alignvlm_jax.serving.protocol import ApiError

BODIES = 8
"""Bodies of the largest size that may be in memory together: a queue is no bound of bytes, since
requests reach it only once they are read."""


class Bodies:
    """Reads bodies.

    Args:
      max_bytes: of each.
      max_seconds: in which each must have come: a client that sends a byte a minute holds its
        connection for ever.
    """

    def __init__(self, max_bytes: int, max_seconds: float):
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """A context manager that yields the body of a request; its bytes count until the end.

        Raises:
          ApiError: it is too large, comes too slowly, or there is no room for it now. What is too
            large is not read to its end.
        """
        # What the client says, before a byte is read; it may say nothing, or lie.
        length = request.headers.get("content-length", "0")
        # Not of any number of digits: Python refuses to read thousands.
        if length.isdecimal() and (len(length) > 18 or int(length) > self._max_bytes):
            raise protocol.too_large("byte", int(length[:18]), self._max_bytes)
        body = bytearray()
        try:
            await self._receive(request, body)
            yield body
        finally:
            self._held -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        try:
            async with asyncio.timeout(self._max_seconds):
                async for part in request.stream():
                    self._held += len(part)
                    body += part
                    self._check(len(body))
        except TimeoutError as err:
            raise ApiError(
                408, f"the body did not come within {self._max_seconds:g} s", "timeout"
            ) from err

    def _check(self, length: int) -> None:
        if length > self._max_bytes:
            raise protocol.too_large("byte", length, self._max_bytes)
        if self._held > BODIES * self._max_bytes:
            raise ApiError(429, "too many large requests at once; try again later", "queue_full")
