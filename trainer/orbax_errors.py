"""Orbax, loaded when it is first needed, and its errors in the words of the operating system, once."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from typing import Any


@functools.cache
def load_orbax() -> Any:
    """The module `orbax.checkpoint` (0.15 s on top of JAX), made to report a failed write only to its caller.

    Left alone, a write that fails in the background is logged three times with its traceback before its caller hears of
    it, and goes on to print one more traceback for each array: TensorStore's threads about an event loop that is closed,
    asyncio about tasks and futures that failed after the first of them was raised.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    logging.getLogger("asyncio").addFilter(
        lambda record: not ("exception was never retrieved" in record.getMessage() and "orbax" in record.getMessage())
    )
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
        if not (late and unraisable.object is None):
            others(unraisable)

    sys.unraisablehook = hook
    return ocp


def cause(error: BaseException) -> str:
    """The reason in words. TensorStore hides the operating system's error number in the text of a ValueError."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return f"{seen.strerror}{f' ({seen.filename})' if seen.filename else ''}"
        if number := re.search(r"os_error_code='(\d+)'", str(seen)):
            return os.strerror(int(number.group(1)))
        seen = seen.__cause__ or seen.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
