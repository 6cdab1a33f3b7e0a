"""transformers with torch on the same work: the loss along a path, and greedy text, from the same checkpoints.

The path is computed in the obvious loop, with our tokens, alphas and dtype. Each program runs in a process of its own,
and its seconds run from the files to the curve: reading, and compiling if it does, but no imports.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from jaxtyping import Int

from benchmarks.results import Row
from benchmarks.speed.sizes import SIZES, Size

_NEEDED = ("torch", "transformers")
_DTYPE = "float32"
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 8, 32, 64


def path(size_name: str, folder: Path) -> Iterator[Row]:
    """Yields how long we take for the curve, beside PyTorch; nothing where it is not installed."""
    if absent := [name for name in _NEEDED if find_spec(name) is None]:
        print(f"path: left out, {', '.join(absent)} not installed (pip install -e '.[bench]')")
        return
    SIZES[size_name].pair(folder)
    ours, theirs = (_in_a_process(program, size_name, folder) for program in ("tracing_jax", "torch"))
    apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    size = SIZES[size_name]
    what = f"curve of {len(size.alphas)} alphas, {size.tokens[0] * size.tokens[1]} tokens, {_DTYPE}"
    note = (
        f"ours reads in {ours['read']:.1f} s, theirs in {theirs['read']:.1f} s; losses at most {apart:.1e} nats apart"
    )
    yield Row("peer", what, ours["seconds"], theirs["seconds"], "s", "transformers with torch", note)
    computing = [run["seconds"] - run["read"] for run in (ours, theirs)]
    note = "ours compiles in it"
    yield Row("peer", f"{what}, after reading", computing[0], computing[1], "s", "transformers with torch", note)


def _in_a_process(program: str, size_name: str, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "curve.json"
        command = [sys.executable, "-m", "benchmarks.speed.peer", f"--program={program}", f"--peer_size={size_name}",
                   f"--pairs={folder}", f"--curve={file}"]  # fmt: skip
        subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True)
        return json.loads(file.read_text("utf-8"))


def _ours(base: Path, ft: Path, size: Size, tokens: np.ndarray) -> tuple[float, list[float]]:
    from benchmarks.speed.steps import DTYPES
    from tracing_jax.checkpoint import load, open_checkpoint
    from tracing_jax.forward import path_losses
    from tracing_jax.interpolation import path_groups
    from tracing_jax.sharding import Compute, make_mesh

    start = time.perf_counter()
    mesh = make_mesh()
    one, other = (load(open_checkpoint(str(folder)), mesh) for folder in (base, ft))
    read = time.perf_counter() - start
    compute = Compute(mesh, size.batch_size, DTYPES[_DTYPE])
    losses = path_losses(one, other, tokens, size.alphas, path_groups(attn=True, emb=True), compute)
    return read, losses.mean(axis=(1, 2), dtype=np.float64).tolist()


def _theirs(base: Path, ft: Path, size: Size, tokens: np.ndarray) -> tuple[float, list[float]]:
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    dtype = getattr(torch, _DTYPE)
    model, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for folder in (base, ft))
    ends = model.state_dict(), other.state_dict()
    read = time.perf_counter() - start
    losses = []
    with torch.no_grad():
        for alpha in size.alphas:
            point = {name: (1 - alpha) * leaf + alpha * ends[1][name] for name, leaf in ends[0].items()}
            model.load_state_dict(point, assign=True)  # `ends` keeps the weights as they were read
            total = 0.0
            for batch in torch.from_numpy(tokens.astype(np.int64)).split(size.batch_size):
                scores = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
                total += float(
                    torch.nn.functional.cross_entropy(scores.float(), batch[:, 1:].flatten(), reduction="sum")
                )
            losses.append(total / (tokens.size - len(tokens)))
    return read, losses


_PROGRAMS: Mapping[str, Callable[[Path, Path, Size, np.ndarray], tuple[float, list[float]]]] = {
    "tracing_jax": _ours,
    "torch": _theirs,
}


def generation(size_name: str, folder: Path) -> Iterator[Row]:
    """Yields the tokens per second that we generate, beside PyTorch; nothing where it is not installed."""
    if find_spec("torch") is None:
        print("generation: left out, torch is not installed (pip install -e '.[bench]')")
        return
    base, _ = SIZES[size_name].pair(folder)
    vocab_size = SIZES[size_name].arch.vocab_size
    prompts = np.random.default_rng(0).integers(vocab_size, size=(_PROMPTS, _PROMPT_TOKENS))
    ours, first = _our_texts(base, prompts)
    theirs, found = _their_texts(base, prompts)
    same = np.mean([a == b for a, b in zip(first, found, strict=True)])
    tokens = _PROMPTS * _NEW_TOKENS
    note = (
        f"{_PROMPTS} prompts of {_PROMPT_TOKENS} tokens, {_NEW_TOKENS} new ones, float32; {same:.0%} of texts the same"
    )
    yield Row("generation", "greedy, compiled before", tokens / ours, tokens / theirs, "tokens/s", "transformers", note)


def _our_texts(base: Path, prompts: Int[np.ndarray, "N T"]) -> tuple[float, list[list[int]]]:
    from tracing_jax.checkpoint import load, open_checkpoint
    from tracing_jax.generation import Sampler, SamplingParams
    from tracing_jax.sharding import Compute, make_mesh

    mesh = make_mesh()
    sampler = Sampler(load(open_checkpoint(str(base)), mesh), Compute(mesh, len(prompts)), SamplingParams(0.0))
    rows = prompts.tolist()
    found = dict(sampler.sample(rows, _NEW_TOKENS))
    start = time.perf_counter()
    dict(sampler.sample(rows, _NEW_TOKENS))
    return time.perf_counter() - start, [found[i] for i in range(len(rows))]


def _their_texts(base: Path, prompts: Int[np.ndarray, "N T"]) -> tuple[float, list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts)
    settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(ids[:, :2], attention_mask=torch.ones_like(ids[:, :2]), **settings)
        start = time.perf_counter()
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return time.perf_counter() - start, found[:, prompts.shape[1] :].tolist()


def main(argv: list[str]) -> None:
    """Computes the curve by one of the programs and writes it with its seconds."""
    del argv
    size = SIZES[flags.FLAGS.peer_size]
    base, ft = size.pair(Path(flags.FLAGS.pairs))
    tokens = size.random_tokens()
    program = _PROGRAMS[flags.FLAGS.program]
    for name in _NEEDED if flags.FLAGS.program == "torch" else ():
        __import__(name)
    start = time.perf_counter()
    read, losses = program(base, ft, size, tokens)
    found = {"seconds": time.perf_counter() - start, "read": read, "losses": losses}
    Path(flags.FLAGS.curve).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_enum("program", None, list(_PROGRAMS), "who computes", required=True)
    flags.DEFINE_string("peer_size", None, "name of a size", required=True)
    flags.DEFINE_string("pairs", None, "folder of the checkpoint pairs", required=True)
    flags.DEFINE_string("curve", None, "file to write", required=True)
    app.run(main)
