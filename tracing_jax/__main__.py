"""`python -m tracing_jax`: the command line `tracing-jax`."""

from tracing_jax.cli import main

if __name__ == "__main__":
    main()
