"""One run of main.py in a process of its own, with what it cost: seconds, peak memory, compilations.

    python -m benchmarks.measured_run --measured=cost.json --config=configs/mode.py:demo --stat=csu --save=runs/csu.p

takes every flag of main.py; `benchmarks.costs` starts it.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

from absl import app, flags

import main as program
from benchmarks.compilations import compilations
from benchmarks.costs import Cost
from benchmarks.memory import peak_anonymous_bytes
from tracing_jax.record import atomic_write

_MEASURED = flags.DEFINE_string("measured", None, "file to write the cost to", required=True)


def main(argv: list[str]) -> None:
    """Runs main.py on the other flags and writes its cost."""
    start = time.perf_counter()
    with peak_anonymous_bytes() as peak, compilations() as compiled:
        program.main(argv)
    record = json.loads(Path(program.run_options().with_save_path().save).with_suffix(".json").read_text("utf-8"))
    cost = Cost(
        seconds=time.perf_counter() - start,
        seconds_by_step=record["seconds"],
        peak_bytes=peak.peak_bytes,
        start_bytes=peak.start_bytes,
        compile_seconds=compiled.seconds,
        compilations=dict(compiled.count),
    )
    atomic_write(Path(_MEASURED.value), json.dumps(asdict(cost)).encode())


if __name__ == "__main__":
    app.run(main)
