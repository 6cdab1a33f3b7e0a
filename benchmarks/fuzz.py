"""Does every damaged checkpoint end in a right answer or one clear error, within 10 seconds and 1 GiB?

    python -m benchmarks.fuzz                                # 2,000 mutations
    python -m benchmarks.fuzz --count=10000 --draw_seed=1

Each mutation of `mutations.py` is made to a copy of a small checkpoint, which is opened and read to its end, with its
tokenizer, in a process of its own. A line for each kind of mutation counts what came out:

* read: every weight was read, and equals what is in the files by another reader (`damaged_weights.py`).
* unchecked: every weight was read, of files that the other reader cannot read, or under names that it does not know.
* refused: one error of the kinds that mean a bad checkpoint, not empty, of less than 4,000 characters.
* wrong: weights differ from what is in the files.
* flood, traceback, late, memory, died: a longer message, an error of another kind, more than 10 seconds, more than
  1 GiB, and the end of the process. Wanted: none of these, and nothing wrong. The first of each kind are printed.

Checkpoints are opened as `compare` opens them: by their weights alone where the config does not fit.
"""

import collections
import json
import os
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Collection
from pathlib import Path

import numpy as np
import transformers
from absl import app, flags, logging

from benchmarks.damaged_weights import weights_in
from benchmarks.environment import OUT_DIR, machine
from benchmarks.mutations import MUTATIONS, write_checkpoints
from tracing_jax.arch import UnsupportedModelError
from tracing_jax.checkpoint import Checkpoint, CheckpointError, WeightsOnly, open_checkpoint
from tracing_jax.data import load_tokenizer
from tracing_jax.record import write_json
from tracing_jax.report import text_table
from tracing_jax.sources import subtrees

_COUNT = flags.DEFINE_integer("count", 2000, "mutations", lower_bound=1)
_SEED = flags.DEFINE_integer("draw_seed", 0, "of the draws")

OUTCOMES = ("read", "unchecked", "refused", "wrong", "flood", "traceback", "late", "memory", "died")
MAX_CHARS, MAX_SECONDS, MAX_BYTES = 4000, 10, 1 << 30


def outcome_of(folder: Path) -> tuple[str, str]:
    """Returns what comes out of opening and reading a checkpoint, and the message if any."""
    try:
        checkpoint = open_checkpoint(str(folder), weights_only=WeightsOnly())
        for _ in subtrees(checkpoint):
            pass
        load_tokenizer(checkpoint.tokenizer_folder)
    except MemoryError:
        return "memory", traceback.format_exc()
    except (CheckpointError, UnsupportedModelError, FileNotFoundError, ValueError) as error:
        # A bare ValueError is what a bug raises too: only the two of tokenizers are meant.
        known = isinstance(error, CheckpointError | UnsupportedModelError | FileNotFoundError)
        text = str(error)
        if not text or not (known or "cannot load this tokenizer" in text or "a slow tokenizer" in text):
            return "traceback", traceback.format_exc()
        return ("flood" if len(text) >= MAX_CHARS else "refused"), text
    except Exception:
        return "traceback", traceback.format_exc()
    return _checked(checkpoint, folder)


def _checked(checkpoint: Checkpoint, folder: Path) -> tuple[str, str]:
    """Returns whether the tensors of a checkpoint are what another reader finds in its files."""
    names = checkpoint.tensors.names()
    stored = {name: weight for name, weight in weights_in(folder).items() if weight.size}
    pairs = [(n, stored[e]) for n in names for e in [_under(n, stored)] if e]
    for name, expected in pairs:
        found = checkpoint.tensors.read(name).astype(np.float64)
        size = np.abs(expected).max()
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-5, atol=1e-6 * size):
            return "wrong", f"{name} {found.shape} is not what is stored {expected.shape}"
    return ("read" if pairs else "unchecked"), ""


def _under(name: str, stored: Collection[str]) -> str | None:
    """Returns the stored name of a tensor, which may have more in front."""
    ends = [other for other in stored if other == name or other.endswith(f".{name}")]
    return min(ends, key=len, default=None)


def in_child(folder: Path) -> tuple[str, str]:
    """Returns the outcome of a folder in a process with limits of time and memory."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _limit()
        found = outcome_of(folder)
        os.write(write_end, json.dumps([found[0], found[1][:MAX_CHARS]]).encode()[: 1 << 15])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) == signal.SIGPROF
        return ("late" if late else "died"), signal.Signals(os.WTERMSIG(status)).name
    return tuple(json.loads(answer)) if answer else ("died", f"exit status {os.WEXITSTATUS(status)}")


def _limit() -> None:
    logging.set_verbosity(logging.ERROR)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # of the processor: other programs may be running


def main(argv: list[str]) -> None:
    """Mutates, reads, and prints the counts."""
    del argv
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # a fork in a program with threads: the child starts none
    counts = {name: collections.Counter[str]() for name in MUTATIONS}
    examples: dict[str, list[str]] = collections.defaultdict(list)
    weights = np.array([weight for _, _, weight in MUTATIONS.values()])
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary) / "cache")  # of what is made of GGUF files
        folders = write_checkpoints(Path(temporary) / "whole checkpoints")
        for folder in folders.values():
            assert outcome_of(folder)[0] == "read", outcome_of(folder)  # and imports what the children need
        for i in range(_COUNT.value):
            rng = np.random.default_rng([_SEED.value, i])
            drawn = str(rng.choice(list(MUTATIONS), p=weights / weights.sum()))
            name = list(MUTATIONS)[i] if i < len(MUTATIONS) else drawn  # each kind once at least
            layout, mutate, _ = MUTATIONS[name]
            copy = shutil.copytree(folders[layout], Path(temporary) / "mutated" / layout)
            mutate(rng, copy)
            outcome, message = in_child(copy)
            counts[name][outcome] += 1
            if outcome not in ("read", "unchecked", "refused") and len(examples[outcome]) < 5:
                examples[outcome].append(f"{name}, seed {_SEED.value}, number {i}:\n{message}")
            shutil.rmtree(Path(temporary) / "mutated")
    _show(counts, examples)


def _show(counts: dict[str, collections.Counter[str]], examples: dict[str, list[str]]) -> None:
    total = sum(counts.values(), collections.Counter[str]())
    rows = [[name, *(found[outcome] for outcome in OUTCOMES)] for name, found in [*counts.items(), ("all", total)]]
    for outcome, messages in examples.items():
        print(f"--- {outcome}\n" + "\n".join(messages))
    print(text_table(rows, ["mutation", *OUTCOMES]))
    print(machine()["summary"])
    out = Path(OUT_DIR.value)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "fuzz.json", {"machine": machine(), "seed": _SEED.value, "counts": counts, "examples": examples})


if __name__ == "__main__":
    app.run(main)
