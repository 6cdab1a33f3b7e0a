"""The tensors of a GGUF file under the names and in the layout of transformers: the inverse of llama.cpp's conversion.

llama.cpp renames tensors, stacks the experts of a layer, and for some families changes what a tensor holds: the rows of
queries and keys of Llama go from halves (those rotated by cosines first) to pairs, Gemma's gains are stored plus one,
and GPT-2's linear weights transposed. Source: llama.cpp's convert_hf_to_gguf.py.
"""

import re
from dataclasses import dataclass

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from tracing_jax.arch import Arch
from tracing_jax.checkpoint.derived_tensors import DerivedTensors
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.checkpoint.tensors import TensorStore

_IN_PAIRS = ("llama", "granite", "olmo")
"""Families whose queries and keys are stored in pairs."""

_PLUS_ONE = ("gemma", "gemma2", "gemma3")
"""Families whose gains are stored plus one."""

_EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<number>\d+)(?P<after>\..*)")
_GPT2_LINEAR = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
_USED_ELSEWHERE = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def with_hf_names(store: TensorStore, architecture: str, arch: Arch) -> TensorStore:
    """Returns the tensors of a model as transformers stores them; those without a counterpart keep their names.

    Args:
      store: the tensors of the file.
      architecture: the name of the family in llama.cpp.
      arch: the facts of the model, from the metadata of the file.
    """
    known = set(store.names())
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(numbers[architecture], arch.num_layers)
    derived = {}
    for name, shape in tensor_shapes(leaf_layouts(arch).values()).items():
        expert = _EXPERT.fullmatch(name)
        plain = f"{expert['before']}{expert['after']}" if expert else name
        theirs = table.get_name(plain, try_suffixes=(".weight", ".bias"))
        if theirs in known:
            is_row = shape[:1] == (1,) and store.shape(theirs) == shape[1:]
            derived[name] = _Converted(store, theirs, *_conversion(name, architecture, arch, expert), is_row)
    used = {tensor.name for tensor in derived.values()}
    return DerivedTensors(store, derived, used | _USED_ELSEWHERE)


def _conversion(
    name: str, architecture: str, arch: Arch, expert: re.Match[str] | None
) -> tuple[int | None, int | None, bool, bool]:
    """Returns the fields of `_Converted` from `expert` to `transposed` for a tensor of transformers."""
    heads = None
    if architecture in _IN_PAIRS:
        queries, keys = arch.num_kv_heads * arch.q_group, arch.num_kv_heads
        heads = next((count for part, count in ((".q_proj.", queries), (".k_proj.", keys)) if part in name), None)
    minus_one = architecture in _PLUS_ONE and name.endswith("norm.weight")
    transposed = architecture == "gpt2" and _GPT2_LINEAR.fullmatch(name) is not None
    return (int(expert["number"]) if expert else None), heads, minus_one, transposed


@dataclass(frozen=True)
class _Converted:
    """A tensor of a file, as transformers stores it.

    Attributes:
      store: the tensors of the file.
      name: of the tensor there.
      expert: which of the stacked experts it is.
      heads: how many heads its rows belong to, if those of a head are stored in pairs.
      minus_one: whether it is stored plus one.
      transposed: whether it is stored transposed.
      is_row: whether it is a matrix of one row, stored as a vector, as versions of llama.cpp's conversion did.
    """

    store: TensorStore
    name: str
    expert: int | None = None
    heads: int | None = None
    minus_one: bool = False
    transposed: bool = False
    is_row: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.store.shape(self.name)
        if self.is_row:
            return (1, *shape)
        shape = shape if self.expert is None else shape[1:]
        return shape[::-1] if self.transposed else shape

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = bounds_of(index, self.shape)
        if self.is_row:
            return self.store.read(self.name, bounds[1:])[None][bounds[0]]
        if self.transposed:
            return np.ascontiguousarray(self.store.read(self.name, bounds[::-1]).T)
        if self.heads is not None:
            return self._in_halves(bounds)
        if self.expert is not None:
            return self.store.read(self.name, (slice(self.expert, self.expert + 1), *bounds))[0]
        found = self.store.read(self.name, bounds)
        return (found.astype(np.float32) - 1).astype(self.dtype) if self.minus_one else found

    def _in_halves(self, bounds: Index) -> np.ndarray:
        """Returns rows of the tensor with those of each head in halves, read from a file that has them in pairs."""
        assert self.heads is not None
        size = self.shape[0] // self.heads
        rows = np.arange(bounds[0].start, bounds[0].stop)
        if not len(rows):
            return self.store.read(self.name, bounds)
        half, place = np.divmod(rows % size, size // 2)
        stored = rows - rows % size + 2 * place + half
        first = int(stored.min())
        return self.store.read(self.name, (slice(first, int(stored.max()) + 1), *bounds[1:]))[stored - first]
