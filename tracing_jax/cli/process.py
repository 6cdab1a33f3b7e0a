"""What a program does about signals and pipes: Ctrl-C ends it in one line at any moment, and a closed pipe is no error.

Only the standard library is imported here: programs call this before anything else.
"""

import contextlib
import io
import os
import signal
import stat
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130
"""The status that shells give to a program stopped by Ctrl-C."""

_LINE = "interrupted; a run that is saved continues where it was when it is started again"
_PATIENCE = 10.0  # seconds


def end_interrupted() -> NoReturn:
    """Ends the program after Ctrl-C with one line."""
    print(_LINE, file=sys.stderr)
    sys.exit(INTERRUPTED)


def prepare_process() -> None:
    """Makes Ctrl-C end this program in one line, and lets it end as if nothing were where a reader has gone away."""
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):  # and not ignored, as by nohup
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _end_where_it_would_be_lost
    for name in ("stdout", "stderr"):
        if output := _without_broken_pipe(getattr(sys, name)):
            setattr(sys, name, output)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt where that ends the program well; a second Ctrl-C, or patience at its end, kills it.

    An import that is interrupted can leave a library half made, which crashes at exit; and there is nothing to undo.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end_now()
        frame = frame.f_back
    timer = threading.Timer(_PATIENCE, _end_now)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _end_where_it_would_be_lost(problem: Any) -> None:
    """Ends the program where Python would print and forget the exception: in a callback, or as something is freed."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        _end_now()
    sys.__unraisablehook__(problem)


def _end_now() -> NoReturn:
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            output.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{_LINE}\n".encode())
    os._exit(INTERRUPTED)


class _Pipe(io.FileIO):
    """A pipe that discards what is written once nobody reads it, so that the program goes on to its exit status."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(content).cast("B"))


def _without_broken_pipe(output: Any) -> io.TextIOWrapper | None:
    """Returns an output to the pipe of this one that raises no BrokenPipeError; None if it is no pipe."""
    try:
        number = output.fileno()
        mode = os.fstat(number).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    output.flush()
    buffer = io.BufferedWriter(_Pipe(number, "wb", closefd=False))
    return io.TextIOWrapper(
        buffer, output.encoding, output.errors, line_buffering=output.line_buffering, write_through=output.write_through
    )
