"""The program `tracing-jax`, also as `python -m tracing_jax`."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` handles it, Ctrl-C ends the program, and shows no traceback of what was being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tracing_jax.cli import main

if __name__ == "__main__":
    main()
