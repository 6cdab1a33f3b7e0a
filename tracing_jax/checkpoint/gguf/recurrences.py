"""The tensors of linear recurrences in a GGUF file, in the layout of transformers.

llama.cpp stores the decay of a head as `-exp(A_log)`, convolutions without their axis of size one, and of Qwen3-Next
queries, keys and values apart from their gates, all heads of a kind together. In Qwen3.5 the heads of values that share
keys are not neighbours: first comes the first head of every group, then the second of every group. Source: llama.cpp's
conversion of these families.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from tracing_jax.arch import Arch, DeltaNet
from tracing_jax.checkpoint.name_patterns import layer_number
from tracing_jax.checkpoint.safetensors_file import Index
from tracing_jax.checkpoint.tensors import TensorStore

QWEN_HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
"""Families with gated delta nets."""

_TENSOR = re.compile(r".*\.linear_attn\.(?P<part>\w+)(\.weight)?")
_THEIRS = {
    "in_proj_qkvz": ("attn_qkv.weight", "attn_gate.weight"),
    "in_proj_qkv": ("attn_qkv.weight",),
    "in_proj_z": ("attn_gate.weight",),
    "in_proj_ba": ("ssm_ba.weight",),
    "in_proj_a": ("ssm_alpha.weight",),
    "in_proj_b": ("ssm_beta.weight",),
    "conv1d": ("ssm_conv1d.weight",),
    "A_log": ("ssm_a",),
    "dt_bias": ("ssm_dt.bias",),
    "norm": ("ssm_norm.weight",),
    "out_proj": ("ssm_out.weight",),
}
"""Tensor of a gated delta net in transformers -> what it is made of in a file."""

_MAMBA = re.compile(r".*\.mixer\.(?P<part>A_log|D|dt_bias|norm\.weight|conv1d\.weight)")
_OF_MAMBA = {
    "A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias", "norm.weight": "ssm_norm.weight",
    "conv1d.weight": "ssm_conv1d.weight",
}  # fmt: skip
"""Tensor of Mamba-2 in transformers -> that of a file."""


@dataclass(frozen=True)
class Rebuilt:
    """A tensor that is made of whole tensors of a file; they are read again for each slice of it.

    Attributes:
      store: the tensors of the file.
      names: of those that it is made of.
      build: makes it of them.
      shape: of it.
    """

    store: TensorStore
    names: tuple[str, ...]
    build: Callable[..., np.ndarray]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.names[0])

    def read(self, index: Index = ()) -> np.ndarray:
        whole = self.build(*(self.store.read(name, ()) for name in self.names))
        return np.ascontiguousarray(whole.reshape(self.shape)[index].astype(self.dtype))


def of_delta_net(
    name: str, shape: tuple[int, ...], architecture: str, arch: Arch, store: TensorStore, known: Collection[str]
) -> Rebuilt | None:
    """Returns a tensor of a gated delta net as transformers stores it; None if it is none, or not in the file.

    Args:
      name: of the tensor in transformers.
      shape: of it there.
      architecture: the name of the family in llama.cpp.
      arch: the facts of the model.
      store: the tensors of the file.
      known: their names.
    """
    match, net = _TENSOR.fullmatch(name), arch.delta_net
    if architecture not in QWEN_HYBRIDS or match is None or net is None or match["part"] not in _THEIRS:
        return None
    theirs = tuple(f"blk.{layer_number(name)}.{end}" for end in _THEIRS[match["part"]])
    if not all(tensor in known for tensor in theirs):
        return None
    return Rebuilt(store, theirs, _build(match["part"], net, architecture == "qwen3next"), shape)


def of_mamba(
    name: str, shape: tuple[int, ...], arch: Arch, store: TensorStore, known: Collection[str]
) -> Rebuilt | None:
    """Returns a tensor of Mamba-2 that transformers stores in another form; None if it is none, or not in the file.

    The arguments are those of `of_delta_net`.
    """
    match = _MAMBA.fullmatch(name)
    if arch.mamba is None or match is None:
        return None
    theirs = f"blk.{layer_number(name)}.{_OF_MAMBA[match['part']]}"
    if theirs not in known:
        return None
    return Rebuilt(store, (theirs,), (lambda x: np.log(-x)) if match["part"] == "A_log" else (lambda x: x), shape)


def _build(part: str, net: DeltaNet, is_grouped: bool) -> Callable[..., np.ndarray]:
    """Returns what makes a tensor; `is_grouped` says whether heads that share keys are neighbours in the file."""
    keys = net.groups * net.key_dim

    def heads(x: np.ndarray) -> np.ndarray:  # head after head on the first axis
        return x if is_grouped else _by_group(x, net)

    def with_values_last(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[: 2 * keys], heads(x[2 * keys :])])

    def all_of_a_group(qkv: np.ndarray, z: np.ndarray) -> np.ndarray:
        parts = (qkv[:keys], qkv[keys : 2 * keys], qkv[2 * keys :], z)
        return np.concatenate([x.reshape(net.groups, -1, x.shape[-1]) for x in parts], axis=1)

    builders: dict[str, Callable[..., np.ndarray]] = {
        "in_proj_qkvz": all_of_a_group,
        "in_proj_ba": lambda x: x,
        "norm": lambda x: x,
        "in_proj_qkv": with_values_last,
        "conv1d": with_values_last,
        "A_log": lambda x: heads(np.log(-x)),
        "out_proj": lambda x: heads(x.T).T,
    }
    return builders.get(part, heads)


def _by_group(x: np.ndarray, net: DeltaNet) -> np.ndarray:
    """Returns rows of heads of values, those of a group together, where the first heads of all groups came first."""
    return x.reshape(net.heads, net.groups, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
