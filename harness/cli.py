"""Command lines: options in, one line for what a user can mend, an orderly stop."""

import errno
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, TypeVar

import tyro

Options = TypeVar("Options")


def run_cli(
    config: type, main: Callable, description: str | None, additive: Collection[str] = ()
) -> None:
    """Parse the command line and call `main`; what a user can mend becomes one line.

    Args:
        config: The dataclass of the script's options.
        main: Called with an instance of it.
        description: The head of --help.
        additive: Options that may be repeated; their values then add up.
    """
    with exit_codes():
        argv = merge_repeats(expand_home(sys.argv[1:]), additive)
        main(parse_options(config, argv, description))


def read_options(
    config: type[Options],
    description: str | None,
    check: Callable[[Options], None],
    additive: Collection[str] = (),
) -> Options:
    """Read the command line of a script and refuse what cannot work: one line, exit code 2.

    Scripts call this before they import torch, which takes seconds. Arguments as in `run_cli`.
    """
    with exit_codes(alike=True):
        argv = merge_repeats(expand_home(sys.argv[1:]), additive)
        cfg = parse_options(config, argv, description)
        check(cfg)
        return cfg


@contextmanager
def exit_codes(alike: bool = False) -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and an exit code, without a traceback.

    Exit codes: 2 for options that cannot be used, 1 for a run that failed, 130 after Ctrl+C.

    Args:
        alike: Whether all processes of a launch fail alike, so that the first speaks for all.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    out, err = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        with redirect_stdout(out), redirect_stderr(err), one_voice():
            yield
    except (ValueError, FloatingPointError, OSError) as error:
        if is_first() or not alike:
            print("error:", " ".join(str(error).split()), file=err)
        wrong = isinstance(error, ValueError) or error.args[:1] == (errno.ENAMETOOLONG,)
        sys.exit(2 if wrong else 1)
    except RuntimeError as error:  # What torch raises without memory, on any device.
        if not re.search("out of memory|not enough memory|allocate .*memory", str(error)):
            raise
        hint = "docs/performance.md says what needs less"
        print(f"error: out of memory ({hint}): {str(error).splitlines()[0]}", file=err)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        out.flush()
        err.flush()


class Unfailing:
    """A stream whose writes never fail, so that no print ends a run.

    Consoles may lack a character (Windows' code pages, LANG=C), terminals and pipes may be gone.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Wrap a stream; Python has None for one that was closed before it started."""
        self.stream = stream or io.StringIO()

    def write(self, text: str) -> int:
        """Write what can be written; a character that the stream lacks becomes its escape."""
        with suppress(OSError, ValueError):  # UnicodeEncodeError is a ValueError.
            return self.stream.write(text)
        with suppress(OSError, ValueError):
            known = self.stream.encoding or "ascii"
            return self.stream.write(text.encode(known, "backslashreplace").decode(known))
        return len(text)

    def flush(self) -> None:
        """Flush; what nobody reads any more is led nowhere.

        Otherwise Python would fail to flush it at exit, and exit with code 120.
        """
        try:
            self.stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # A stream without a file has nothing to lead.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        """Return whatever else the stream has."""
        return getattr(self.stream, name)


def is_first() -> bool:
    """Return whether this process is the one that speaks and writes, of several that train."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def one_voice() -> Iterator[None]:
    """Keep every process but the first from printing."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def parse_options(
    config: type[Options],
    argv: Sequence[str],
    description: str | None,
    default: Options | None = None,
) -> Options:
    """Parse a command line; tyro's box about a mistake becomes one line.

    Raises:
        SystemExit: after --help (0), or an option that cannot be read (2).
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(config, args=argv, description=description, default=default)
    except SystemExit as stop:
        if stop.code:  # None or 0 after --help.
            print(f"error: {_reason(box.getvalue())}; --help lists all options", file=sys.stderr)
        raise


def _reason(box: str) -> str:
    """Return what tyro says of a mistake in one line; it has no hook for that (1.0.17).

    Its box has a title, the reason, and after a rule advice, or options that could have been meant.
    On consoles that know only ASCII there is a rule below the title, too.
    """
    text = re.sub("^[ │|]+|[ │|]+$", "", box, flags=re.MULTILINE)
    parts = re.split("^[╰─-]{9,}╯?$", text.partition("\n")[2], flags=re.MULTILINE)
    reason = next((" ".join(part.split()) for part in parts if part.strip()), "no such options")
    meant = re.search(r"you meant:\s+(--[\w.-]+)", text)
    return reason.rstrip(".") + (f"; perhaps {meant[1]}" if meant else "")


def expand_home(argv: Sequence[str]) -> list[str]:
    """Replace the ~ of values such as ~/run and --out=~/run, which shells may leave as it is.

    For scripts whose options are names, paths and numbers; a text such as a prompt stays as typed.
    """

    def expand(word: str) -> str:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return flag + equals + os.path.expanduser(value)

    return [expand(word) for word in argv]


def merge_repeats(argv: Sequence[str], additive: Collection[str]) -> list[str]:
    """Put the values of a repeated option behind those it had before, or refuse the repetition.

    Args:
        argv: A command line, without the script's name.
        additive: Names of options with values that add up, such as "lora" for --lora.

    Raises:
        ValueError: another option is given twice.
    """
    given: list[list[str]] = [[]]  # Each option and its values; first what stands before them all.
    for word in argv:
        if re.match(r"--?[A-Za-z]", word):  # A number such as -1 is a value.
            given.append([word])
        else:
            given[-1].append(word)
    merged: dict[str, list[str]] = {"": given[0]}
    values_of: dict[str, list[str]] = {}
    for first, *more in given[1:]:
        flag, equals, value = first.partition("=")
        flag = flag.replace("_", "-")
        values = [value, *more] if equals else more
        adds_up = flag.lstrip("-").replace("-", "_") in additive
        if flag not in merged:
            merged[flag] = [flag, *values] if adds_up else [first, *more]
            values_of[flag] = values
        elif adds_up:
            merged[flag] += values
        else:
            both = " and ".join(" ".join(words) for words in (values_of[flag], values) if words)
            raise ValueError(f"{flag} is given twice" + (f": {both}" if both else ""))
    return [word for words in merged.values() for word in words]


@contextmanager
def options_settled() -> Iterator[None]:
    """Mark the part of a script where a ValueError is no option's fault: it keeps its traceback."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError("a bug, since every option had been checked") from error


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl+C, SIGTERM and SIGHUP in a list, read between two steps; a second one kills."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[number])
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    # Windows has no SIGHUP, which a closed ssh session sends.
    numbers = {getattr(signal, f"SIG{name}", signal.SIGINT) for name in ("INT", "TERM", "HUP")}
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
