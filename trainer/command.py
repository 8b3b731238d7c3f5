"""What every command line shares: exit codes, error sentences, and our own flag syntax."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""What a disk has against being written to."""


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main` on the command line and exit with its code; errors meant for people are printed as one message.

    Set `STRATA_TRACEBACK=1` to see the traceback of such an error too.
    """
    _open_standard_streams()
    from trainer.collision import ForeignPackage, check_packages

    try:
        check_packages()
    except ForeignPackage as error:
        _leave(2, str(error))
    from strata import StrataError

    try:
        code = main(sys.argv[1:])
    except StrataError as error:
        if os.environ.get("STRATA_TRACEBACK"):
            traceback.print_exc()
        _leave(error.exit_code, str(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK:
            raise
        if os.environ.get("STRATA_TRACEBACK"):
            traceback.print_exc()
        _leave(1, f"{error.filename or 'a file'} could not be written: {error.strerror}")
    sys.exit(code)


def _open_standard_streams() -> None:
    """Where one of them was closed by whoever started this process, a file that is opened later would take its number, and
    be written to by whatever prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _leave(code: int, message: str) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
