"""What a run of main.py costs: it is started in a process of its own, which measures itself and says."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[1]


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
    """A run that was to be measured did not come to its end; the message is the end of what it said."""


def measured_run(base: str | Path, ft: str | Path, stat: str, fields: Mapping[str, Any]) -> Cost:
    """Returns the cost of `main.py` on a pair, in a process of its own, with these options by dotted name.

    Raises:
      FailedRunError: the run ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        cost, save = Path(folder) / "cost.json", Path(folder) / "run.p"
        fields = {"base_model_id": base, "ft_model_id": ft, "stat": stat, "save": save, **fields}
        command = [sys.executable, "-m", "benchmarks.measured_run", f"--measured={cost}"]
        command += ["--config=configs/mode.py", *(f"--{name}={value}" for name, value in fields.items())]
        done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode or not cost.exists():
            raise FailedRunError(f"{stat} on {base} and {ft}: {done.stderr[-2000:]}")
        return Cost(**json.loads(cost.read_text("utf-8")))
