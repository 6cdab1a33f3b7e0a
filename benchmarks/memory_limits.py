"""Runs main.py on a pair of large models and checks the peak of its memory against limits that must hold.

    python -m benchmarks.write_pair --shape=llama2-7b --save=pairs/7b
    python -m benchmarks.memory_limits --pair=pairs/7b --limits=llama2-7b
    python -m benchmarks.write_pair --shape=llama2-70b --save=pairs/70b --sparse
    python -m benchmarks.memory_limits --pair=pairs/70b --limits=llama2-70b --plan

Every run has a process of its own and streams both models. Peaks are of anonymous memory: pages of the files that are
read do not count. Memory that is free again is given back, as it is where less than 16 GiB are free. Most runs use only
the first layers; the seconds of the whole model are those of the steps that go layer by layer, times its depth over
theirs, and those of the other steps. A limit that is broken makes the exit status 1. `--plan` adds what the whole model
would take, from its shapes and the rates of this machine.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.environment import OUT_DIR, PUBLISH, machine
from benchmarks.pairs import write_text
from benchmarks.plan import measured_rates, plan
from benchmarks.results import markdown_table, replace_between
from benchmarks.run_cost import Cost, FailedRunError, measured_run
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.record import atomic_write
from tracing_jax.report import text_table

GIB = 2**30
_TOKENS, _BLOCK_SIZE, _ALPHAS = 4096, 512, (0.0, 0.5, 1.0)
_LITTLE_FREE = {"MALLOC_PERTURB_": "0"}
"""Without a meaning for malloc: what the user sets of it keeps the program from letting malloc keep freed memory."""
_BY_LAYER = ("statistic", "align", "statistic aligned")


@dataclass(frozen=True)
class Limit:
    """A run, and the most that it may take.

    Attributes:
      layers: the first layers that it uses; 0 for all.
      gib: of anonymous memory at the peak.
      fields: of the config, beside these.
    """

    name: str
    stat: str
    layers: int
    gib: float
    fields: Mapping[str, Any] = field(default_factory=dict)


def _limits(
    layers: int, csu_layers: int, csu: float, match: float, mode: float, align: float, batch_size: int
) -> tuple[Limit, ...]:
    alphas = ",".join(map(str, _ALPHAS))
    text = {
        "num_tokens": _TOKENS,
        "block_size": _BLOCK_SIZE,
        "mode.alphas": alphas,
        "batch_size": batch_size,
    }
    aligning = {"align": True, "align_axes": "embed,mlp", "l2.num_perm": 1}
    return (
        Limit("csu", "csu", csu_layers, csu),
        Limit("match, weights", "match", layers, match, {"match.forms": "weights"}),
        Limit(f"mode, {len(_ALPHAS)} alphas, {_TOKENS:,} tokens", "mode", layers, mode, text),
        Limit("alignment of embed and mlp", "l2", layers, align, aligning),
    )


LIMITS: Mapping[str, Sequence[Limit]] = {
    "llama2-7b": _limits(layers=4, csu_layers=0, csu=3, match=4, mode=6, align=4, batch_size=8),
    "llama2-70b": _limits(layers=2, csu_layers=2, csu=12, match=12, mode=12, align=12, batch_size=4),
}
"""Shape -> the limits that a machine of 24 GiB without an accelerator must keep."""

HEADERS = ("run", "layers", "peak GiB", "limit GiB", "of limit", "seconds", "whole model, hours", "steps")
PLAN_HEADERS = ("step", "GB read", "TFLOP", "hours at these rates", "note")

_PAIR = flags.DEFINE_string("pair", None, "folder that holds base and ft", required=True)
_LIMITS = flags.DEFINE_enum("limits", "llama2-7b", list(LIMITS), "whose limits")
_ONLY = flags.DEFINE_list("only", [], "statistics to run; all by default")
_LAYERS = flags.DEFINE_integer("layers", None, "use only so many layers in every run, for a trial", lower_bound=1)
_PLAN = flags.DEFINE_bool("plan", False, "print what the whole model would take")


@dataclass(frozen=True)
class Outcome:
    """What a run took beside its limit; without a cost if it failed; `error` is the message."""

    limit: Limit
    layers: int
    depth: int
    cost: Cost | None
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the run came to its end within its limit."""
        return self.cost is not None and self.cost.peak_bytes <= self.limit.gib * GIB

    @property
    def cells(self) -> list[str]:
        """The line of the table, in the order of `HEADERS`."""
        layers = f"{self.layers} of {self.depth}"
        if self.cost is None:
            return [self.limit.name, layers, "-", f"{self.limit.gib:g}", "-", "-", "-", self.error.splitlines()[-1]]
        by_step, peak = self.cost.seconds_by_step, self.cost.peak_bytes / GIB
        steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in by_step.items())
        deep = sum(seconds for step, seconds in by_step.items() if step in _BY_LAYER)
        whole = (sum(by_step.values()) - deep + deep * self.depth / self.layers) / 3600
        return [self.limit.name, layers, f"{peak:.2f}", f"{self.limit.gib:g}", f"{peak / self.limit.gib:.2f}",
                f"{self.cost.seconds:.0f}", f"{whole:.2f}", steps]  # fmt: skip


def outcomes(pair: Path, limits: Sequence[Limit], layers: int | None = None) -> Iterator[Outcome]:
    """Yields what each run took; a run that fails does not stop the others."""
    depth = open_checkpoint(str(pair / "base")).arch.num_layers
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder) / "text.txt")
        for limit in limits:
            count = layers or limit.layers
            fields = {"memory": "stream", "max_layers": count, "dataset": text, **limit.fields}
            try:
                cost = measured_run(pair / "base", pair / "ft", limit.stat, fields, _LITTLE_FREE)
                yield Outcome(limit, min(count or depth, depth), depth, cost)
            except FailedRunError as error:
                yield Outcome(limit, min(count or depth, depth), depth, None, str(error).strip())


def plan_rows(pair: Path) -> tuple[list[list[str]], str]:
    """Returns the table of the plan, and the rates behind it in a sentence."""
    model = open_checkpoint(str(pair / "base"))
    rates = measured_rates(model.tensors.files())
    rows = [
        [step.name, f"{step.read_bytes / 1e9:,.0f}", f"{step.flops / 1e12:,.1f}", f"{rates.seconds(step) / 3600:.2f}",
         step.note]
        for step in plan(model, _TOKENS, _BLOCK_SIZE, len(_ALPHAS))
    ]  # fmt: skip
    reads, computes = rates.bytes_per_second / 1e9, rates.flops_per_second / 1e9
    return rows, f"At {reads:.2f} GB/s from the disk and {computes:.0f} GFLOP/s in products of float32 matrices."


def main(argv: list[str]) -> None:
    """Runs, prints and writes; exits with 1 if a limit is broken."""
    del argv
    pair, name = Path(_PAIR.value), _LIMITS.value
    limits = [limit for limit in LIMITS[name] if not _ONLY.value or limit.stat in _ONLY.value]
    found = []
    for outcome in outcomes(pair, limits, _LAYERS.value):
        found.append(outcome)
        print(*outcome.cells, sep="  ", flush=True)
        if outcome.error:
            print(outcome.error, file=sys.stderr)
    rows = [outcome.cells for outcome in found]
    print(text_table(rows, HEADERS))
    text = f"{machine()['summary']}.\n\n{markdown_table(HEADERS, rows)}"
    if _PLAN.value:
        planned, rates = plan_rows(pair)
        print(text_table(planned, PLAN_HEADERS), rates, sep="\n")
        text += f"\nThe whole model: {rates}\n\n{markdown_table(PLAN_HEADERS, planned)}"
    Path(OUT_DIR.value).mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "outcomes": [asdict(outcome) for outcome in found]}
    atomic_write(Path(OUT_DIR.value) / f"memory-{name}.json", json.dumps(record, indent=1).encode())
    if PUBLISH.value:
        replace_between(f"memory {name}", text)
    if broken := [outcome.limit.name for outcome in found if not outcome.holds]:
        sys.exit(f"limits broken: {', '.join(broken)}")


if __name__ == "__main__":
    app.run(main)
