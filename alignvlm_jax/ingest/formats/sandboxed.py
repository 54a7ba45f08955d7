"""Calls of the process in which formats read what may hang, crash or take all memory: PDFs, images,
and OCR."""

from collections.abc import Callable
from typing import Any

from alignvlm_jax.data.sandbox import CallEnded, Sandbox
from alignvlm_jax.ingest.formats.base import Reject

sandbox = Sandbox()
"""The process of this one, for all formats: a worker reads one record at a time."""


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args) of the other process, as `Sandbox.call`.

    What is set in this process, as `files.ROOTS`, is not set in that.

    Raises:
      Reject: it was ended, or the function raised one.
      UserError: the process cannot be started. That is no fault of the record.
      Exception: whatever the function raised.
    """
    try:
        return sandbox.call(function, *args)
    except CallEnded as err:
        raise Reject(str(err)) from err
