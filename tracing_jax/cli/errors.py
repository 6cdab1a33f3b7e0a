"""Command-line logging and user-facing error handling."""

import contextlib
import logging as stdlib_logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from absl import logging


def configure_logging() -> None:
    """Makes log lines a time and a message on stderr, without the notices that there is no PyTorch and no TPU."""
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(stdlib_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    stdlib_logging.getLogger("jax._src.xla_bridge").setLevel(stdlib_logging.WARNING)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the program with one clear message for an error that a user can correct."""
    try:
        yield
    except KeyboardInterrupt:
        end_interrupted()
    except Exception as error:
        # JAX is known by name, so that importing this module does not import it.
        of_user = isinstance(error, ValueError | OSError | ModuleNotFoundError)
        if not of_user and type(error).__name__ != "JaxRuntimeError":
            raise
        logging.debug("where it happened", exc_info=True)
        memory = (
            "\nless memory: a smaller batch_size, dtype=bfloat16, or more devices" if "RESOURCE" in str(error) else ""
        )
        sys.exit(f"error: {error}{memory}\n(--verbosity=1 shows where it happened)")


def end_interrupted() -> NoReturn:
    """Ends the program after Ctrl-C: one line, and the status that shells give to a program stopped by it."""
    print("interrupted; a run that is saved continues where it was when it is started again", file=sys.stderr)
    sys.exit(130)
