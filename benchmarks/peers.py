"""Whole programs on the same pairs, side by side: what each says, its seconds, the memory it holds, the bytes it reads.

    pip install -e ".[bench]"
    python -m benchmarks.peers                        # the demo's pairs
    python -m benchmarks.peers --sizes=1b-layer       # and random weights of that shape, beside a copy
    python -m benchmarks.peers --publish              # into RESULTS.md

Each program runs in a process of its own, from its start to its end, once with the files dropped from the page cache,
which shows what it reads, and then `--repeats` times with them in it. Programs that are not installed are left out.

* `compare`: `tracing-jax compare`, all that it does; `csu`: the one test of it that takes least.
* `modelDNA`: fingerprints of sampled weights, by `modeldna compare` (Apache 2.0, arXiv:2607.10617).
* `torch loop`: what a user writes in ten lines: both state dicts, and the cosine of each pair of tensors.
"""

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.environment import PUBLISH, machine
from benchmarks.results import markdown_table, replace_between
from benchmarks.speed.reading import drop
from benchmarks.speed.sizes import SIZES
from tracing_jax import demo
from tracing_jax.report import text_table

_MIB = 2**20
_REPOSITORY = Path(__file__).parents[1]
_HEADERS = ("pair", "program", "says", "s, warm", "CPU s", "peak MiB", "MiB read")
_DEMO_PAIRS = ("finetune", "disguised", "independent")

_SIZES = flags.DEFINE_list(
    "sizes", [], f"pairs of random weights and a permuted copy with noise, of {', '.join(SIZES)}"
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "runs with the files in the page cache, of which the fastest counts")
_LOOP = flags.DEFINE_list("loop", None, "two folders: print the mean cosine of their tensors, by torch, and stop")


@dataclass(frozen=True)
class Program:
    """A program that compares two checkpoints.

    Attributes:
      needs: the package without which it is left out.
      command: (base, other, an empty folder) -> the command line.
      says: what it printed, and that folder -> its answer in a few words.
    """

    needs: str
    command: Callable[[Path, Path, Path], list[str]]
    says: Callable[[str, Path], str]


@dataclass(frozen=True)
class Run:
    """One run of a program: seconds on the clock and of CPU, the largest resident set, its standard output."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def _own(*options: str) -> Program:
    def command(base: Path, other: Path, folder: Path) -> list[str]:
        return [sys.executable, "-m", "tracing_jax", "compare", str(base), str(other), "--save", str(folder / "run.p"),
                "--quiet", *options]  # fmt: skip

    return Program("tracing_jax", command, _own_verdict)


def _own_verdict(output: str, folder: Path) -> str:
    del output
    verdict = json.loads((folder / "run.json").read_text("utf-8"))["verdict"]
    return str(verdict["verdict"]).replace("_", " ")


def _modeldna(base: Path, other: Path, folder: Path) -> list[str]:
    del folder
    return [sys.executable, "-m", "modeldna.cli", "compare", str(other), str(base), "--json"]


def _modeldna_verdict(output: str, folder: Path) -> str:
    del folder
    verdict = json.loads(output)["verdict"]
    return f"{verdict['verdict'].lower().replace('_', ' ')}, probability {verdict['probability']:.3f}"


def _loop(base: Path, other: Path, folder: Path) -> list[str]:
    del folder
    return [sys.executable, "-m", "benchmarks.peers", f"--loop={base},{other}"]


PROGRAMS: Mapping[str, Program] = {
    "compare": _own(),
    "csu": _own("--stat", "csu"),
    "modelDNA": Program("modeldna", _modeldna, _modeldna_verdict),
    "torch loop": Program("torch", _loop, lambda output, folder: f"mean cosine {output.split()[-1]}"),
}
"""Name of a program -> how it is run."""


def run(command: Sequence[str]) -> Run:
    """Runs a command in the repository and returns what it took.

    Raises:
      RuntimeError: it ended with an error; with the end of what it printed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=_REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with {process.returncode}: {printed[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss, printed)


def cached_bytes(files: Sequence[Path]) -> int:
    """Returns how many bytes of the files are in the page cache, mapped or read by whichever program."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = 0
    for file in files:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            pages = np.empty(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            address = ctypes.c_void_p(view.ctypes.data)
            if libc.mincore(address, ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore", str(file))
            found += int((pages & 1).sum()) * mmap.PAGESIZE
            del view
    return found


def measured(program: Program, base: Path, other: Path, repeats: int) -> list[str]:
    """Returns the cells that say what a program answers on a pair, and what it takes."""
    files = tuple(sorted([*base.glob("*.safetensors"), *other.glob("*.safetensors")]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = program.command(base, other, folder)
        drop(files)
        run(command)
        read = cached_bytes(files)
        runs = [run(command) for _ in range(repeats)]
        best = min(runs, key=lambda found: found.seconds)
        says = program.says(best.output, folder)
    return [says, f"{best.seconds:.1f}", f"{best.cpu_seconds:.1f}", f"{best.peak_bytes / _MIB:.0f}",
            f"{read / _MIB:.1f} of {sum(file.stat().st_size for file in files) / _MIB:.1f}"]  # fmt: skip


def rows(pairs: Mapping[str, tuple[Path, Path]], repeats: int) -> Iterator[list[str]]:
    """Yields the lines of the table, pair by pair."""
    for name, program in PROGRAMS.items():
        if find_spec(program.needs) is None:
            print(f"{name}: left out, {program.needs} is not installed (pip install -e '.[bench]')")
    for pair, (base, other) in pairs.items():
        for name, program in PROGRAMS.items():
            if find_spec(program.needs) is not None:
                yield [pair, name, *measured(program, base, other, repeats)]


def _print_mean_cosine(base: str, other: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    one, two = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict() for folder in (base, other)
    )
    cosines = [torch.nn.functional.cosine_similarity(one[name].flatten(), two[name].flatten(), dim=0) for name in one]
    print(f"{float(torch.stack(cosines).mean()):.3f}")


def main(argv: list[str]) -> None:
    """Prints the table, and publishes it."""
    del argv
    if _LOOP.value:
        _print_mean_cosine(*_LOOP.value)
        return
    base = demo.member("base")
    pairs = {f"demo, {name}": (base, demo.member(name)) for name in _DEMO_PAIRS}
    with tempfile.TemporaryDirectory() as folder:
        pairs |= {f"{size}, permuted copy with noise": SIZES[size].pair(Path(folder) / size) for size in _SIZES.value}
        found = list(rows(pairs, _REPEATS.value))
    print(text_table(found, _HEADERS))
    if PUBLISH.value:
        replace_between("peers", f"{machine()['summary']}.\n\n{markdown_table(_HEADERS, found)}")


if __name__ == "__main__":
    app.run(main)
