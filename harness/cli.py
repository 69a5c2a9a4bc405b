"""Command lines: options in, one line for what a user can mend, an orderly stop."""

import errno
import io
import operator
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import dropwhile, takewhile

import tyro

from harness import ranks


def run_cli(config: type, main: Callable, description: str) -> None:
    """Parse the command line and call `main`; what a user can mend becomes one line, no traceback.

    Exit codes: 2 for options that cannot be used, 1 for a run that failed, 130 after Ctrl+C.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        with ranks.one_voice():
            main(parse_options(config, description))
    except (ValueError, FloatingPointError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        wrong = isinstance(error, ValueError) or error.args[:1] == (errno.ENAMETOOLONG,)
        sys.exit(2 if wrong else 1)
    except RuntimeError as error:  # What torch raises without memory, on any device.
        if not re.search("out of memory|not enough memory|allocate .*memory", str(error)):
            raise
        reason = str(error).splitlines()[0]
        print(f"error: out of memory (README.md says what needs less): {reason}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def parse_options(config: type, description: str) -> object:
    """Parse the command line; of its mistakes tyro's box of several lines becomes one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(config, description=description)
    except SystemExit as stop:
        if stop.code:  # None or 0 after --help.
            lines = re.sub("[│╭╮╰╯─]|-{5,}", "", box.getvalue()).splitlines()
            title, *lines = map(str.strip, lines)
            reason = " ".join(takewhile(bool, dropwhile(operator.not_, lines))) or title
            meant = re.search(r"you meant:.*?(--[\w-]+)", " ".join(lines))
            hint = f"perhaps {meant[1]}; " if meant else ""
            print(f"error: {reason.rstrip('.')} ({hint}--help lists all options)", file=sys.stderr)
        raise


@contextmanager
def options_settled() -> Iterator[None]:
    """Mark the part of a script where a ValueError is no option's fault: it keeps its traceback."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError("a bug, since every option had been checked") from error


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl+C and SIGTERM in a list, to be read between two steps; a second one kills."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[number])
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
