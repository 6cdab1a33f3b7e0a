"""How long does a report on a merge take beside reading the files? Writes three checkpoints, and measures.

    python -m benchmarks.merge_speed --models=runs/merge_7b                    # 40 GB, of which nothing stays cached
    python -m benchmarks.merge_speed --models=runs/merge_4 --num_layers=4      # 6.4 GB, from the page cache

The child is the base plus .6 of the difference of one parent, in bfloat16 like both. Reading is one thread that reads
all weights of the three, file after file. Reading and the report take turns, each in a process of its own; files that
do not fit the page cache together leave it before each, so that neither finds a part of them there.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags

from benchmarks.pairs import SHAPES, PairSpec, config_of, write_pair
from tracing_jax.checkpoint import fits_page_cache
from tracing_jax.report import text_table

_MODELS = flags.DEFINE_string("models", None, "folder of the three checkpoints, written where it is not", required=True)
_SHAPE = flags.DEFINE_string("shape", "llama2-7b", f"path of a config.json, or one of {', '.join(SHAPES)}")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", None, "layers, if not those of the shape", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 2, "how often both are measured", lower_bound=1)
_SHARE = 0.6
_BLOCK = 2**23
_READ = f"""
import sys
buffer = bytearray({_BLOCK})
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
"""


def write_models(folder: Path) -> None:
    """Writes base, ft (the parent) and child."""
    write_pair(folder, config_of(_SHAPE.value, _NUM_LAYERS.value), PairSpec(permute=()))
    child = folder / "child"
    child.mkdir()
    for file in (folder / "base").iterdir():
        if file.suffix != ".safetensors":
            (child / file.name).write_bytes(file.read_bytes())
            continue
        with (
            file.open("rb") as base,
            (folder / "ft" / file.name).open("rb") as ft,
            (child / file.name).open("wb") as to,
        ):
            size = 8 + int.from_bytes(base.read(8), "little")
            base.seek(0)
            to.write(base.read(size))
            ft.seek(size)
            while block := base.read(_BLOCK):
                one, other = (np.frombuffer(b, ml_dtypes.bfloat16).astype(np.float32) for b in (block, ft.read(_BLOCK)))
                to.write((one + _SHARE * (other - one)).astype(ml_dtypes.bfloat16).tobytes())


def leave_page_cache(files: list[str]) -> None:
    """Makes the kernel forget what it has of files that are larger together than the page cache can be."""
    if fits_page_cache(map(Path, files)):
        return
    for name in files:
        with open(name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(command: list[str]) -> tuple[float, float, float]:
    """Returns the seconds, the processor's seconds, and the GiB of peak memory of a process."""
    with tempfile.NamedTemporaryFile("r") as out:
        start = time.monotonic()
        # A process of its own, of which the kernel counts the memory.
        code = f"import resource, subprocess, sys; rc = subprocess.run({command!r}).returncode; u = resource.getrusage(resource.RUSAGE_CHILDREN); open({out.name!r}, 'w').write(f'{{u.ru_utime + u.ru_stime}} {{u.ru_maxrss}}'); sys.exit(rc)"  # fmt: skip  # noqa: E501
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds = time.monotonic() - start
        cpu, kib = map(float, out.read().split())
    return seconds, cpu, kib / 2**20


def main(argv: list[str]) -> None:
    """Measures and prints a table."""
    del argv
    folder = Path(_MODELS.value)
    if not folder.exists():
        write_models(folder)
    members = [folder / name for name in ("child", "ft", "base")]
    files = [str(file) for member in members for file in sorted(member.glob("*.safetensors"))]
    size = sum(Path(file).stat().st_size for file in files) / 1e9
    child, parent, base = map(str, members)
    report = [sys.executable, "-m", "tracing_jax", "merge", child, "--parents", parent, "--base", base]
    rows = []
    for _ in range(_TURNS.value):
        leave_page_cache(files)
        read = measured([sys.executable, "-c", _READ, *files])
        leave_page_cache(files)
        own = measured(report)
        rows.append([size, *read[:2], *own, own[0] / read[0]])
        print(rows[-1], flush=True)
    headers = ["GB", "reading, s", "CPU-s", "report, s", "CPU-s", "peak GiB", "report / reading"]
    print(text_table(rows, headers))


if __name__ == "__main__":
    app.run(main)
