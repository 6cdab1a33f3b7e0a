"""Writes a pair of checkpoints with random weights: `base`, and `ft`, the same plus noise with its units permuted.

    python -m benchmarks.write_pair --shape=llama2-7b --save=pairs/7b               # 27 GB
    python -m benchmarks.write_pair --shape=llama2-70b --save=pairs/70b --sparse    # 276 GB, of which 9 are on disk
    python -m benchmarks.write_pair --shape=path/to/config.json --save=pairs/ours --num_layers=4

Both are bfloat16 in sharded safetensors, with a tokenizer of the model's vocabulary size, and open like any checkpoint.
In a sparse pair all layers but the first few are holes in the files, which read as zeros: for tests of memory at sizes
that do not fit the disk. Time on holes says nothing about a disk.
"""

import time
from pathlib import Path

from absl import app, flags

from benchmarks.pairs import SHAPES, PairSpec, config_of, write_pair

_SHAPE = flags.DEFINE_string("shape", "tiny", f"path of a config.json, or one of {', '.join(SHAPES)}")
_SAVE = flags.DEFINE_string("save", None, "folder to write; it gets the folders base and ft", required=True)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", None, "layers, if not those of the shape", lower_bound=1)
_SPARSE = flags.DEFINE_bool("sparse", False, "leave holes for all but --random_layers layers, embedding and head")
_RANDOM_LAYERS = flags.DEFINE_integer("random_layers", 2, "layers of a sparse pair that have weights", lower_bound=0)
_NOISE = flags.DEFINE_float("noise", 0.1, "noise of ft, in standard deviations of the weights", lower_bound=0.0)
_PERMUTE = flags.DEFINE_list("permute", ["embed", "mlp"], "axis kinds that ft has in another order; empty for none")
_SEED = flags.DEFINE_integer("seed", 0, "seed of weights, noise and permutations")


def main(argv: list[str]) -> None:
    """Writes the pair and prints its size and the seconds."""
    del argv
    start = time.monotonic()
    random_layers = _RANDOM_LAYERS.value if _SPARSE.value else None
    recipe = PairSpec(_NOISE.value, tuple(filter(None, _PERMUTE.value)), random_layers, seed=_SEED.value)
    folder = Path(_SAVE.value)
    write_pair(folder, config_of(_SHAPE.value, _NUM_LAYERS.value), recipe)
    stats = [file.stat() for file in folder.rglob("*.safetensors")]
    size, on_disk = sum(stat.st_size for stat in stats), sum(512 * stat.st_blocks for stat in stats)
    print(f"{folder}: {size / 1e9:.2f} GB, {on_disk / 1e9:.2f} on disk, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    app.run(main)
