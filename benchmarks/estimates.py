"""What a pair of very large models costs, from the shapes alone: bytes, operations, and seconds on so many GPUs.

    python -m benchmarks.estimates             # prints the table
    python -m benchmarks.estimates --publish   # and puts it into docs/large_models.md

Nothing is run. Operations are those of the matrix products, of which the steps have by far the most; the seconds are
theirs at half the peak of the GPUs, or those of reading all bytes of the pair, whichever is longer. Letters: L layers,
D features, F units of an MLP, T tokens, V vocabulary, A points of a path.
"""

from collections.abc import Iterator
from pathlib import Path

from absl import app

from benchmarks.environment import PUBLISH
from benchmarks.pairs import config_of
from benchmarks.plan import Rates, Step
from benchmarks.speed.timing import (
    block_flops_per_token,
    gram_flops_per_token,
    head_flops_per_token,
    match_flops_per_token,
    row_gram_flops,
)
from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.options import Match, Mode, RunOptions
from tracing_jax.record import atomic_write
from tracing_jax.statistics.match import TAPS

DENSE = ("llama2-7b", "llama2-70b", "llama3.1-405b")
GPUS = (1, 8, 64)

FLOAT32, BFLOAT16 = 67e12, 989e12
"""Operations per second of one H100 SXM: float32 without tensor cores, in which similarities are computed; bfloat16
with them, without sparsity. Source: NVIDIA's data sheet of the H100."""

SHARE_OF_PEAK = 0.5
READING = 25e9
"""Bytes per second at which a node of eight GPUs reads its share of the files: four fast local disks."""

PATH_TOKENS = 131_072
_BEGIN, _END = "<!-- estimate -->\n", "<!-- end of estimate -->\n"


def pair_size(arch: Arch) -> float:
    """Returns the bytes of a pair of dense models in bfloat16, without their norms."""
    attention = 2 * arch.embed_dim * arch.head_dim * arch.num_kv_heads * (arch.q_group + 1)
    mlp = 3 * arch.embed_dim * arch.mlp_dim
    embeddings = (1 if arch.tied else 2) * arch.vocab_size * arch.embed_dim
    return 2 * 2.0 * (arch.num_layers * (attention + mlp) + embeddings)


def steps(arch: Arch) -> Iterator[tuple[Step, float]]:
    """Yields what each statistic reads and computes for a pair of dense models, and one GPU's peak at it."""
    L, T, taps, block = arch.num_layers, Match().max_tokens, len(TAPS), RunOptions().block_size
    layer, pair_bytes = block_flops_per_token(arch, block), pair_size(arch)
    yield Step("csu", pair_bytes, L * row_gram_flops(arch)), FLOAT32
    yield Step("match, weights", pair_bytes, L * T * match_flops_per_token(arch, taps)), FLOAT32
    yield Step("match, forward", pair_bytes, L * T * (2 * layer + gram_flops_per_token(arch, taps))), FLOAT32
    path = PATH_TOKENS * len(Mode().alphas) * (L * layer + head_flops_per_token(arch))
    yield Step("mode", pair_bytes, path), BFLOAT16


def rates(gpus: int, peak: float) -> Rates:
    """Returns what so many GPUs do, eight a node; each node has the files of its layers."""
    return Rates(READING * max(1, gpus // 8), peak * SHARE_OF_PEAK * gpus)


def table() -> str:
    """Returns the costs of all shapes in Markdown."""
    header = ["model", "a pair in bfloat16", "statistic", "operations", *(_gpus(n) for n in GPUS)]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for name in DENSE for row in _rows(name))]) + "\n"


def _rows(name: str) -> Iterator[list[str]]:
    arch = arch_from_config(config_of(name))
    for step, peak in steps(arch):
        seconds = [_duration(rates(n, peak).seconds(step)) for n in GPUS]
        yield [name, f"{step.read_bytes / 1e9:,.0f} GB", step.name, f"{step.flops:.1e}", *seconds]


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' if number > 1 else ''}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def main(argv: list[str]) -> None:
    """Prints the table, and publishes it if asked."""
    del argv
    text = table()
    print(text, end="")
    if PUBLISH.value:
        page = Path(__file__).parents[1] / "docs" / "large_models.md"
        head, _, rest = page.read_text("utf-8").partition(_BEGIN)
        atomic_write(page, f"{head}{_BEGIN}{text}{_END}{rest.partition(_END)[2]}".encode())


if __name__ == "__main__":
    app.run(main)
