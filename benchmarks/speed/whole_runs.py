"""Whole statistics on a pair of checkpoints, each in a process of its own: seconds, peak memory and compilations."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.pairs import write_text
from benchmarks.results import Row
from benchmarks.run_cost import Cost, measured_run
from benchmarks.speed.reading import file_bytes, plain_seconds
from benchmarks.speed.sizes import Size

GIB = 2**30
_MOST_NAMED = 3


def statistics(size: Size, text: Path) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """Returns name -> (statistic, fields of the config): each that a pair is usually asked for."""
    blocks, block_size = size.tokens
    read = {"dataset": text, "num_tokens": blocks * block_size, "block_size": block_size,
            "batch_size": size.batch_size}  # fmt: skip
    return {
        "csu": ("csu", {}),
        "match, weights": ("match", {"match.forms": "weights"}),
        "match, forward": ("match", {"match.forms": "forward", **read}),
        f"mode, {len(size.alphas)} alphas": (
            "mode",
            {"mode.alphas": ",".join(map(str, size.alphas)), "mode.attn": True, "mode.emb": True, **read},
        ),
        f"l2, {size.num_perm} copies": ("l2", {"l2.num_perm": size.num_perm}),
        "cos": ("cos", {}),
    }


def whole_runs(size: Size, folder: Path) -> Iterator[Row]:
    """Yields what each statistic costs on the pair of this size: three lines for each."""
    base, ft = size.pair(folder)
    seconds = plain_seconds(base) + plain_seconds(ft)
    pair_bytes = file_bytes(base) + file_bytes(ft)
    for name, (stat, fields) in statistics(size, write_text(folder / "text.txt")).items():
        yield from _rows(name, measured_run(base, ft, stat, fields), seconds, pair_bytes)


def _rows(name: str, cost: Cost, read_seconds: float, pair_bytes: int) -> Iterator[Row]:
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in cost.seconds_by_step.items())
    yield Row("whole run", name, cost.seconds, read_seconds, "s", "reading the pair's files", steps)
    started = f"{cost.start_bytes / GIB:.2f} GiB before the work began"
    yield Row("peak memory", name, cost.peak_bytes / GIB, pair_bytes / GIB, "GiB", "the pair's files", started)
    often = sorted(cost.compilations.items(), key=lambda item: -item[1])[:_MOST_NAMED]
    most = ", ".join(f"{function} {count}" for function, count in often)
    note = f"{sum(cost.compilations.values())} compilations, most of {most}" if often else "no compilation"
    yield Row("compiling", name, cost.compile_seconds, cost.seconds, "s", "the whole run", note)
