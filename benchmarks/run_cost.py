"""What one run of main.py costs, in a process of its own: seconds, peak memory, compilations.

    python -m benchmarks.run_cost --measured=cost.json --config=configs/mode.py:demo --stat=csu --save=runs/csu.p

takes every flag of main.py; `measured_run` starts it and reads the file.

Memory is the anonymous part of the resident set, heap and arrays, without the pages of files that are read or mapped:
the kernel keeps a high-water mark only of both together, so this part is sampled on a thread.
"""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from tracing_jax.record import atomic_write

_REPOSITORY = Path(__file__).parents[1]
_SECONDS_BETWEEN = 0.02  # between two samples of memory: an array that exists for less may be missed
_RSS_ANON = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
_COMPILING = "/jax/core/compile/"
_BACKEND = _COMPILING + "backend_compile_duration"


@dataclass(frozen=True)
class Cost:
    """What one run took.

    Attributes:
      seconds: from the start of the work to its end, without starting Python and imports.
      seconds_by_step: the run's own record of its steps.
      peak_bytes: of anonymous memory; `start_bytes` of it were there before the work began.
      compile_seconds: tracing, lowering and compiling.
      compilations: function -> times it was compiled.
    """

    seconds: float
    seconds_by_step: Mapping[str, float]
    peak_bytes: int
    start_bytes: int
    compile_seconds: float
    compilations: Mapping[str, int]


class FailedRunError(RuntimeError):
    """A run that was to be measured failed; the message is the end of its standard error."""


def measured_run(
    base: str | Path, ft: str | Path, stat: str, fields: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> Cost:
    """Returns the cost of `main.py` on a pair, in a process of its own, with these options by dotted name.

    `env` is added to the environment.

    Raises:
      FailedRunError: the run ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        cost, save = Path(folder) / "cost.json", Path(folder) / "run.p"
        fields = {"base_model_id": base, "ft_model_id": ft, "stat": stat, "save": save, **fields}
        command = [sys.executable, "-m", "benchmarks.run_cost", f"--measured={cost}"]
        command += ["--config=configs/mode.py", *(f"--{name}={value}" for name, value in fields.items())]
        more = os.environ | dict(env or {})
        done = subprocess.run(command, cwd=_REPOSITORY, env=more, capture_output=True, text=True, check=False)
        if done.returncode or not cost.exists():
            raise FailedRunError(f"{stat} on {base} and {ft}: {done.stderr[-2000:]}")
        return Cost(**json.loads(cost.read_text("utf-8")))


@dataclass
class Compilations:
    """The compilations so far.

    Attributes:
      seconds: spent tracing, lowering and compiling, all together.
      count: name of the function -> times that it was compiled.
    """

    seconds: float = 0.0
    count: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Compilations of all functions together."""
        return sum(self.count.values())


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Counts the compilations of this process while the block runs."""
    found, active = Compilations(), True

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        if not active or not event.startswith(_COMPILING):
            return
        found.seconds += duration_secs
        if event == _BACKEND:
            found.count[re.sub(r"^jit\((.*)\)$", r"\1", str(facts.get("fun_name", "?")))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        active = False  # jax has no public way to unregister a listener


@dataclass
class Peak:
    """Anonymous memory so far, in bytes.

    Attributes:
      peak_bytes: the largest sample.
      start_bytes: the first one: interpreter and imports.
    """

    peak_bytes: int
    start_bytes: int


def anonymous_bytes() -> int:
    """Returns the resident anonymous memory of this process.

    Raises:
      OSError: the system has no /proc/self/status.
      ValueError: it has no RssAnon line.
    """
    status = Path("/proc/self/status").read_text("utf-8")
    found = _RSS_ANON.search(status)
    if found is None:
        raise ValueError("/proc/self/status has no RssAnon line; Linux 4.5 or newer is needed")
    return 1024 * int(found[1])


@contextlib.contextmanager
def peak_anonymous_bytes() -> Iterator[Peak]:
    """Samples the anonymous memory of this process while the block runs; read `peak_bytes` at its end."""
    now = anonymous_bytes()
    peak, done = Peak(now, now), threading.Event()

    def sample() -> None:
        while not done.wait(_SECONDS_BETWEEN):
            peak.peak_bytes = max(peak.peak_bytes, anonymous_bytes())

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.peak_bytes = max(peak.peak_bytes, anonymous_bytes())


def main(argv: list[str]) -> None:
    """Runs main.py on the other flags and writes its cost."""
    import main as program

    start = time.perf_counter()
    with peak_anonymous_bytes() as peak, compilations() as compiled:
        program.main(argv)
    save = program.run_options().with_save_path().save
    assert save is not None
    record = json.loads(Path(save).with_suffix(".json").read_text("utf-8"))
    cost = Cost(
        seconds=time.perf_counter() - start,
        seconds_by_step=record["seconds"],
        peak_bytes=peak.peak_bytes,
        start_bytes=peak.start_bytes,
        compile_seconds=compiled.seconds,
        compilations=dict(compiled.count),
    )
    atomic_write(Path(flags.FLAGS.measured), json.dumps(asdict(cost)).encode())


if __name__ == "__main__":
    importlib.import_module("main")  # which defines its flags
    flags.DEFINE_string("measured", None, "file to write the cost to", required=True)
    app.run(main)
