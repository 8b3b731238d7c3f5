"""What every command line shares: exit codes, error sentences, and our own flag syntax."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main` on the command line and exit with its code; errors meant for people are printed as one message.

    Set `STRATA_TRACEBACK=1` to see the traceback of such an error too.
    """
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
    sys.exit(code)


def _leave(code: int, message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
