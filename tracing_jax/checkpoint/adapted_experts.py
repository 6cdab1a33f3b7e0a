"""LoRA on the parameters of experts (PEFT's `target_parameters`): which factors change which tensors of the base.

transformers holds all experts of a layer as two parameters, `gate_up_proj` and `down_proj`; a checkpoint has these, or
a tensor for each expert. Letters: E experts, r rank. A is [E * r, in] with the rows of an expert one after another, B
is [out, r * E] with its columns E apart; the update of expert e is scaling * B[:, e::E] A[e * r : (e + 1) * r].
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracing_jax.checkpoint.derived_tensors import Derived, DerivedTensors
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import shortened

_FACTOR = re.compile(
    r"base_model\.model\.(?P<path>.+?)(?P<nested>(\.base_layer)*)\.lora_(?P<side>[AB])(\.default)?\.weight"
)
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Parameter of transformers -> the tensors of an expert that are its rows, in their order, by either names."""

_ExpertTensor = tuple[str, int | None, int]
"""A tensor of the base, its expert (None: it holds all), and the first of its rows in the parameter."""


@dataclass(frozen=True)
class AdaptedExperts:
    """A tensor of one expert, or of all, with the product of factors added in float32, then cast back.

    Attributes:
      base: the tensors of the base; `name` is the one.
      adapter: those of the adapter; `a` and `b` are the factors.
      experts: E.
      expert: e; None for a tensor of all experts.
      first: of the rows of B that belong to this tensor.
      in_out: whether it is [E, in, out].
      scaling: of the product.
    """

    base: TensorStore
    name: str
    adapter: TensorStore
    a: str
    b: str
    experts: int
    expert: int | None
    first: int
    in_out: bool
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape(self.name)

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        *which, rows, columns = bounds_of(index, self.shape)
        out, inputs = (columns, rows) if self.in_out else (rows, columns)
        experts = [self.expert] if self.expert is not None else range(self.experts)[which[0]]
        rank = self.adapter.shape(self.a)[0] // self.experts
        own = slice(self.first + out.start, self.first + out.stop)
        b = self.adapter.read(self.b, (own,)).astype(np.float32)
        weight = self.base.read(self.name, index).astype(np.float32)
        stacked = weight[None] if self.expert is not None else weight
        for place, e in enumerate(experts):
            a = self.adapter.read(self.a, (slice(e * rank, (e + 1) * rank), inputs)).astype(np.float32)
            delta = np.float32(self.scaling) * (b[:, e :: self.experts] @ a)
            stacked[place] += delta.T if self.in_out else delta
        return weight.astype(self.dtype)


def with_adapted_experts(
    base: TensorStore, adapter: TensorStore, config: Mapping[str, Any]
) -> tuple[TensorStore, TensorStore]:
    """Returns the base with its experts changed, and the adapter without the factors that did it.

    Args:
      base: its tensors.
      adapter: its tensors.
      config: of the adapter.

    Raises:
      CheckpointError: factors do not fit one parameter that the config names, or its tensors.
    """
    targets = config.get("target_parameters") or ()
    if not targets:
        return base, adapter
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"target_parameters = {shortened(targets)}, expected names of parameters")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise CheckpointError("target_parameters with rank_pattern or alpha_pattern are not merged; merge it with PEFT")
    known, derived, used = set(base.names()), dict[str, Derived](), set[str]()
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for name in adapter.names():
        if (match := _FACTOR.fullmatch(name)) and f"{match['path']}.weight" not in known:
            pairs.setdefault((match["path"], match["nested"]), {})[match["side"]] = name
    for (path, _), factors in pairs.items():
        own = {target.rpartition(".")[2] for target in targets if f".{path}".endswith(f".{target.rpartition('.')[0]}")}
        if not own or factors.keys() != {"A", "B"}:
            continue  # a misfit that is named with the others
        found = [update for part in sorted(own) for update in _fitting(base, adapter, factors, (path, part), config)]
        if not found:
            raise CheckpointError(
                f"{factors['A']!r} fits none, or several, of {path}.{', '.join(sorted(own))} of the base"
            )
        if twice := [update.name for update in found if update.name in derived]:
            raise CheckpointError(f"{factors['A']!r} is the second of its kind for {twice[0]!r}")
        derived |= {update.name: update for update in found}
        used |= set(factors.values())
    return DerivedTensors(base, derived), DerivedTensors(adapter, {}, used)


def _fitting(
    base: TensorStore, adapter: TensorStore, factors: Mapping[str, str], parameter: tuple[str, str],
    config: Mapping[str, Any],
) -> list[AdaptedExperts]:  # fmt: skip
    """Returns the updates of the tensors of a parameter by these factors; none if these are of another size."""
    path, part = parameter
    a, b, rank = factors["A"], factors["B"], int(config["r"])
    (rows, size_in), (size_out, columns) = adapter.shape(a), adapter.shape(b)
    experts = rows // rank
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if rows != columns or rows != experts * rank or not experts:
        return []
    places = list(_places(base, path, part))
    in_out = _is_in_out(base, path, part)
    if not places or in_out is None:
        return []
    if places[0][1] is None:
        fits = base.shape(places[0][0]) == (experts, *((size_in, size_out) if in_out else (size_out, size_in)))
    else:
        last, _, first = places[-1]
        shapes = {base.shape(name)[1:] for name, *_ in places}
        fits = 1 + max(e or 0 for _, e, _ in places) == experts and shapes == {(size_in,)}
        fits = fits and first + base.shape(last)[0] == size_out
    return [AdaptedExperts(base, n, adapter, a, b, experts, e, i, in_out, scaling) for n, e, i in places if fits]


def _places(base: TensorStore, path: str, part: str) -> Iterator[_ExpertTensor]:
    """Yields the tensors of a parameter: one, or those of each expert, under the names that their families have."""
    known = set(base.names())
    if f"{path}.{part}" in known:
        yield f"{path}.{part}", None, 0
        return
    for where in (path, path.replace(".mlp.experts", ".block_sparse_moe.experts")):
        for names in _PARTS.get(part, ()):
            expert = 0
            while all(f"{where}.{expert}.{name}.weight" in known for name in names):
                first = 0
                for name in names:
                    yield f"{where}.{expert}.{name}.weight", expert, first
                    first += base.shape(f"{where}.{expert}.{name}.weight")[0]
                expert += 1
            if expert:
                return


def _is_in_out(base: TensorStore, path: str, part: str) -> bool | None:
    """Returns whether a parameter of all experts is [E, in, out]; None if that is not known.

    Gate and up have twice as many outputs as down has inputs, so that the two determine it even where one is square.
    """
    both, down = f"{path}.gate_up_proj", f"{path}.down_proj"
    if f"{path}.{part}" not in base.names():
        return False
    if not {both, down} <= set(base.names()) or {len(base.shape(both)), len(base.shape(down))} != {3}:
        return None
    (_, *two), (_, *one) = base.shape(both), base.shape(down)
    ways = [way for way in (False, True) if _are_of_one_mlp(two[::-1] if way else two, one[::-1] if way else one)]
    return ways[0] if len(ways) == 1 else None


def _are_of_one_mlp(gate_up: list[int], down: list[int]) -> bool:
    """Returns whether the sizes [2 F, D] and [D, F] go together."""
    return gate_up[0] == 2 * down[1] and gate_up[1] == down[0]
