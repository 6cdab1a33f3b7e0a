"""Checkpoints derived from another by changes of its tensors, as adapters, quantisers and pruners make them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file
from test_quantised import save

from tracing_jax.claims.quantised_copies import _TABLES

Tensors = dict[str, np.ndarray]


def derived(source: Path, folder: Path, change: Callable[[Tensors], Mapping[str, np.ndarray]], **config: Any) -> Path:
    """Returns the folder of a copy of a checkpoint whose tensors went through a function, its config changed too."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    save(folder / "model.safetensors", dict(change(load_file(source / "model.safetensors"))))
    return folder


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer of a block."""
    return name.endswith("_proj.weight")


def adapted(tensors: Tensors, rank: int, size: float, dtype: Any = np.float32, seed: int = 0) -> Tensors:
    """Adds to each linear layer a matrix of this rank and relative size, and rounds the sum."""
    rng = np.random.default_rng(seed)

    def update(weight: np.ndarray) -> np.ndarray:
        product = rng.normal(size=(weight.shape[0], rank)) @ rng.normal(size=(rank, weight.shape[1]))
        return (weight + size * weight.std() * product / np.sqrt(rank)).astype(dtype)

    return {name: update(w.astype(np.float32)) if is_linear(name) else w.astype(dtype) for name, w in tensors.items()}


def rounded(tensors: Tensors, dtype: Any = ml_dtypes.bfloat16) -> Tensors:
    """Rounds all tensors."""
    return {name: weight.astype(dtype) for name, weight in tensors.items()}


def without_layer(tensors: Tensors, gone: int) -> Tensors:
    """Drops a layer and moves the later ones up."""
    found = {}
    for name, weight in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) == gone:
                continue
            parts[2] = str(int(parts[2]) - (int(parts[2]) > gone))
        found[".".join(parts)] = weight
    return found


def with_units(tensors: Tensors, kept: np.ndarray) -> Tensors:
    """Keeps these MLP units of every layer."""
    found = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            found[name] = np.ascontiguousarray(weight[kept])
        if name.endswith("down_proj.weight"):
            found[name] = np.ascontiguousarray(weight[:, kept])
    return found


def int8(tensors: Tensors) -> Tensors:
    """Quantises linear layers as LLM.int8 does: the largest magnitude of a row is 127 steps."""
    found: Tensors = {}
    for name, weight in tensors.items():
        if not is_linear(name):
            found[name] = weight
            continue
        largest = np.abs(weight).max(axis=1)
        found[name] = np.round(weight * (127 / largest)[:, None]).astype(np.int8)
        found[name.removesuffix("weight") + "SCB"] = largest.astype(np.float32)
    return found


def float8(tensors: Tensors) -> Tensors:
    """Quantises linear layers to E4M3 with one scale each."""
    found: Tensors = {}
    for name, weight in tensors.items():
        if not is_linear(name):
            found[name] = weight
            continue
        scale = np.float32(np.abs(weight).max() / 448)
        found[name] = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
        found[f"{name}_scale"] = np.array([scale], np.float32)
    return found


def nf4(tensors: Tensors) -> Tensors:
    """Quantises linear layers as bitsandbytes does to NF4, in blocks of 64."""
    table = np.array(_TABLES["NF4"], np.float32)
    found: Tensors = {}
    for name, weight in tensors.items():
        if not is_linear(name):
            found[name] = weight
            continue
        blocks = weight.reshape(-1, 64)
        largest = np.abs(blocks).max(axis=1).astype(np.float32)
        codes = np.abs(blocks[..., None] / largest[:, None, None] - table).argmin(-1).astype(np.uint8).reshape(-1, 2)
        state = json.dumps({"shape": list(weight.shape), "blocksize": 64, "quant_type": "nf4", "dtype": "float32"})
        found[name] = (codes[:, :1] << 4) | codes[:, 1:]
        found[f"{name}.absmax"], found[f"{name}.quant_map"] = largest, table
        found[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(state.encode(), np.uint8).copy()
    return found


def int4(tensors: Tensors) -> Tensors:
    """Rounds linear layers to 4 bits in groups of 32, up or down at random, as those do that make up for errors."""
    rng, found = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, weight in tensors.items():
        if not is_linear(name):
            found[name] = weight
            continue
        groups = weight.reshape(-1, 32).astype(np.float64)
        least = groups.min(axis=1, keepdims=True)
        step = np.ptp(groups, axis=1, keepdims=True) / 15
        codes = np.clip(np.floor((groups - least) / step + rng.random(groups.shape)), 0, 15)
        found[name] = (codes * step + least).astype(np.float32).reshape(weight.shape)
    return found
