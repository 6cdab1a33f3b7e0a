"""Command-line logging and user-facing error handling."""

import contextlib
import logging as stdlib_logging
import os
import sys
from collections.abc import Iterator

from absl import flags, logging

from tracing_jax.cli.process import end_interrupted


def configure_logging(verbosity: int | None = None) -> None:
    """Makes log lines a time and a message on stderr, without the notices that there is no PyTorch and no TPU.

    Args:
      verbosity: -1 for warnings, 0 for progress too, 1 for all; None leaves it as it is.
    """
    if verbosity is not None:
        if not flags.FLAGS.is_parsed():  # absl would say so with the first line
            flags.FLAGS(sys.argv[:1])
        logging.set_verbosity(verbosity)
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


@contextlib.contextmanager
def exit_on_usage_error() -> Iterator[None]:
    """Ends the program with one clear message and status 2 for a mistake in its command line."""
    try:
        yield
    except (ValueError, OSError) as error:
        ending = SystemExit(f"error: {error}")
        print(f"{ending}\n(--help lists every option)", file=sys.stderr)
        ending.code = 2  # the interpreter would print a text, and end with status 1
        raise ending from None
