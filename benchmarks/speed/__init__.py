"""What each part of the program costs, as a share of what the machine can do; run by `python -m benchmarks`."""
