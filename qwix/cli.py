"""The command `qwix`: its entry point, and what an error looks like.

The commands themselves are in `qwix.commands`, which needs the packages of the extra `cli`.
"""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from qwix._src.utils.extras import MissingExtraError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 if all went well, 2 for anything that the user can mend.

    A signal to terminate ends it like an error does, so that no half-written directory stays.
    """
    try:
        from qwix import commands
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich", "safetensors", "tokenizers"}:
            raise
        _fail(f"the command line needs the package {error.name!r}: pip install 'qwix[cli]'")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        commands.app(args=arguments, prog_name="qwix")
    except (*commands.USER_ERRORS, MissingExtraError) as error:
        _fail(" ".join(str(error).split()))
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def _fail(message: str) -> None:
    print(f"qwix: {message}", file=sys.stderr)
    sys.exit(2)
