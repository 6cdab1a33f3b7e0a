"""Finds the parts of a language model, or of a component of one, by the names and shapes of its tensors.

Letters: D features, F units of an MLP, P positions, V vocab.
"""

import bisect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.checkpoint.weights_only.description import Description, Matrix, TensorLocation
from tracing_jax.checkpoint.weights_only.mlps import Mlp, find_mlps
from tracing_jax.checkpoint.weights_only.names import (
    Stack,
    component_of,
    expert_pattern,
    main_stack,
    module_of,
    names_of_component,
    sizes_of_components,
    stacks_of,
)
from tracing_jax.checkpoint.weights_only.norms import NORM_OF_TYPE, Norm, mlp_norms, norms_of_layer, without_gains
from tracing_jax.checkpoint.weights_only.numbers import (
    common_direction,
    guess_gain_offset,
    is_near_identity,
    is_rule,
    which_is_gate,
)
from tracing_jax.error_messages import counted, listed

Shapes = Mapping[str, tuple[int, ...]]

_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "n_embed", "embedding_length", "dim", "hidden_dim", "embed_dim")
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "block_count")
_HEAD = re.compile(r"lm_head|(^|[._])head|^output|embed_out|output_layer|logits|unembed|output_projection")
_EMBEDDING = re.compile(r"emb|wte|tok|shared|word")
_POSITION = re.compile(r"(^|[._])(pos|wpe|token_type|segment|rel)")
_FINAL_NORM = re.compile(r"norm|(^|[._])ln")
_WRITES = re.compile(r"(^|[._])(o|out|dense|c_proj|wo|output|o_proj|out_proj|attn_output|proj)$")
_READS = re.compile(r"(^|[._])(w?[qkv]|query|key|value|q_proj|k_proj|v_proj|attn_[qkv]|c_attn|in_proj|w_?pack)$|qkv")
_NO_MATRIX = re.compile(
    r"pos|rotary|mask|relative|conv|norm|a_log|dt_|lora|bias|time_|tm_|decay|table|inv_freq|scale|router"
)
_ROPE_KEYS = re.compile(r"rope|rotary|alibi|rel(ative)?_?(pos|att)|freq_base", re.IGNORECASE)
_ROPE_TENSORS = re.compile(
    r"rotary|inv_freq|relative_attention_bias|a_log|conv1d|time_decay|ssm_|rel_pos|time_maa|slopes"
)
_SAMPLED_ROWS = 64
_SAMPLED = 4  # layers whose numbers settle a doubt


def describe(store: TensorStore, config: Mapping[str, Any], component: str | None = None) -> Description:
    """Returns what was found of a language model, or of a component such as `vision`.

    Raises:
      CheckpointError: there are no layers with a common number of features.
    """
    names = names_of_component(store.names(), component)
    if not names:
        others = listed(sizes_of_components(dict.fromkeys(store.names(), 1))) or "none"
        raise CheckpointError(f"no tensors of a component {component} by their names; components are: {others}")
    if component in ("vision", "audio"):
        own = [value for key, value in config.items() if component_of(key) == component and isinstance(value, Mapping)]
        config = {key: value for part in own for key, value in part.items()}
    return _Finder(store, names, config, component).description()


class _Finder:
    def __init__(self, store: TensorStore, names: Sequence[str], config: Mapping[str, Any], component: str | None):
        self.store, self.component, self.config = store, component, dict(_flat(config))
        self.shapes: Shapes = {name: store.shape(name) for name in names}
        sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in self.shapes.items()}
        stacks = stacks_of(names)
        found = main_stack(stacks, sizes, encoder=component == "encoder")
        if found is None:
            raise CheckpointError("no tensor's name has the number of a layer, so that nothing can be compared")
        self.stack: Stack = found
        self.layers = {
            layer: {rest: self.shapes[name] for rest, name in tensors.items()}
            for layer, tensors in found.layers.items()
        }
        inside = {name for stack in stacks for layer in stack.layers.values() for name in layer.values()}
        own = {name for layer in found.layers.values() for name in layer.values()}
        self.outside = {name: shape for name, shape in self.shapes.items() if name not in inside}
        self.width = self._width()
        self.notes: list[str] = []
        if others := [stack for stack in stacks if stack is not found and len(stack.layers) > 1]:
            some = listed((f"{stack.pattern} ({len(stack.layers)})" for stack in others), 3)
            self.notes.append(f"not compared: other layers, {some}")
        self.parts: dict[str, TensorLocation] = {}
        self.unknown: dict[str, str] = {"heads": "how heads differ, and their sizes, are not known from weights alone"}
        self.own = own

    def description(self) -> Description:
        """Returns everything that was found."""
        self._note_missing_layers()
        mlps = self._add_mlps()
        self._add_ends()
        norm = self._add_norms(mlps)
        self._check_features()
        layers = sorted(mlps) if mlps else sorted(self.layers)
        in_out = self._is_in_out(mlps)
        found = Description(
            self.width, layers, self.parts, norm=norm, tied=self._is_tied(), in_out=in_out, unknown=self.unknown
        )
        return replace(found, matrices=tuple(self._matrices(found)), notes=tuple(self.notes))

    def _note_missing_layers(self) -> None:
        """Notes where layers seem to be missing: the config has more, or their numbers have gaps."""
        stated = next((n for key in _DEPTH_KEYS if isinstance(n := self.config.get(key), int)), None)
        if self.component is None and stated is not None and len(self.layers) < stated:
            self.notes.append(f"the config has {stated} layers, and tensors of {len(self.layers)} were found")
        if absent := sorted(set(range(min(self.layers), max(self.layers))) - set(self.layers)):
            self.notes.append(f"there are no tensors of the layers {listed(map(str, absent), 10)}, which are left out")

    def _width(self) -> int:
        """Returns D: the size that most tensors of the layers have on an axis."""
        counts: Counter[int] = Counter()
        for layer in self.layers.values():
            shapes = {expert_pattern(rest)[0]: shape for rest, shape in layer.items()}
            for shape in shapes.values():
                counts.update({size for size in shape[-2:] if size > 1} if shape else ())
        if not counts:
            raise CheckpointError(f"{self.stack.pattern}: the layers have no matrices")
        most = counts.most_common(1)[0][1]
        stated = [value for key in _WIDTH_KEYS if isinstance(value := self.config.get(key), int)]
        if self.component is None:
            stated += [
                size for name, shape in self.outside.items() if _EMBEDDING.search(name.lower()) for size in shape
            ]
        close = [size for size in stated if counts.get(size, 0) > most // 2]
        return close[0] if close else counts.most_common(1)[0][0]

    def _add_mlps(self) -> dict[int, Mlp]:
        """Adds the parts of one kind of MLP, that of most layers, and returns it for each layer that has it."""
        kinds: dict[tuple[object, ...], dict[int, Mlp]] = defaultdict(dict)
        for number, shapes in self.layers.items():
            for mlp in find_mlps(shapes, self.width):
                kinds[mlp.kind][number] = mlp
        if not kinds:
            self.unknown["units"] = "no MLPs were found among the matrices of the layers"
            return {}
        most = max(len(layers) for layers in kinds.values())
        dense = [layers for layers in kinds.values() if next(iter(layers.values())).experts is None]
        wide = [layers for layers in dense if 3 * len(layers) >= most]
        # Of kinds in as many layers the widest: Gemma 3n has two pairs of narrow matrices beside each MLP.
        chosen = max(wide or kinds.values(), key=lambda layers: (len(layers), next(iter(layers.values())).units))
        chosen = self._without_repeats(chosen)
        mlp = next(iter(chosen.values()))
        for others in kinds.values():
            if others and next(iter(others.values())).kind != mlp.kind:
                other = next(iter(others.values()))
                experts = f"{other.experts} experts" if other.experts else "MLPs"
                self.notes.append(f"not compared: {experts} in {len(others)} layers, {other.modules}")
        prefix = self.stack.pattern + "."
        self.parts["down"] = TensorLocation(prefix + mlp.down.rest, how=mlp.how)
        if mlp.fused is not None:
            self._add_fused(mlp, prefix, sorted(chosen))
        else:
            assert mlp.up is not None
            self.parts["up"] = TensorLocation(prefix + mlp.up.rest, how=mlp.how)
            if mlp.gate is not None:
                self.parts["gate"] = TensorLocation(prefix + mlp.gate.rest, how=mlp.how)
                if not mlp.order_known:
                    self._order_by_numbers(sorted(chosen))
        return chosen

    def _without_repeats(self, mlps: dict[int, Mlp]) -> dict[int, Mlp]:
        """Returns the layers without those whose MLP is that of an earlier one: one layer is one piece of evidence."""
        kept: dict[int, Mlp] = {}
        seen: set[bytes] = set()
        for layer, mlp in sorted(mlps.items()):
            rest = mlp.down.rest.replace("{expert}", "0")
            name = self.stack.layers[layer].get(rest)
            first = self.store.read(name, (slice(0, 1),)).tobytes()[:4096] if name else b""
            if not first or first not in seen or not any(first):
                kept[layer] = mlp
            seen.add(first)
        if len(kept) < len(mlps):
            many = counted(
                len(mlps) - len(kept),
                "layer repeats the MLP of another and is",
                "layers repeat the MLP of another and are",
            )
            self.notes.append(f"{many} left out")
        return kept

    def _add_fused(self, mlp: Mlp, prefix: str, layers: Sequence[int]) -> None:
        """Adds the two halves of a matrix of gate and up if numbers distinguish them; otherwise neither."""
        assert mlp.fused is not None
        tensor = prefix + mlp.fused
        found = []
        for halves in (("first", "second"), ("even", "odd")):
            sides = list(zip(*(self._common_directions(tensor, halves, layer) for layer in _sampled(layers))))
            gate = which_is_gate(*sides) if len(sides) == 2 else None
            if gate is not None:
                found.append((halves[gate], halves[1 - gate]))
        if len(found) == 1:
            how = "by numbers: its rows have a direction in common, those of the other half have none"
            self.parts["gate"] = TensorLocation(tensor, found[0][0], how)  # type: ignore[arg-type]
            self.parts["up"] = TensorLocation(tensor, found[0][1], how)  # type: ignore[arg-type]
            return
        self.unknown["units"] = (
            f"doubtful: {mlp.fused} holds gate and up, and their numbers do not determine how, in halves or by turns; "
            "units are compared by what they write alone"
        )

    def _common_directions(self, tensor: str, halves: Sequence[str], layer: int) -> Iterator[float]:
        name = tensor.replace("{layer}", str(layer)).replace("{expert}", "0")
        shape = self.shapes[name]
        index = (slice(0, 1),) if len(shape) == 3 else ()
        weights = self.store.read(name, index).astype(np.float32).reshape(shape[-2:])
        rows = weights if shape[-1] == self.width else weights.T
        middle = len(rows) // 2
        sides = {
            "first": rows[:middle], "second": rows[middle:], "even": rows[::2], "odd": rows[1::2], "whole": rows,
        }  # fmt: skip
        yield from (common_direction(sides[half]) for half in halves)

    def _order_by_numbers(self, layers: Sequence[int]) -> None:
        """Exchanges gate and up if their numbers say so; notes how the order was found."""
        gate, up = self.parts["gate"], self.parts["up"]
        sides = [
            [next(self._common_directions(part.tensor, ("whole",), i)) for i in _sampled(layers)] for part in (gate, up)
        ]
        found = which_is_gate(*sides)
        how = "by numbers: rows of the gate have a direction in common" if found is not None else gate.how
        one, other = (up, gate) if found == 1 else (gate, up)
        self.parts["gate"], self.parts["up"] = replace(one, how=how), replace(other, how=how)

    def _add_ends(self) -> None:
        """Adds embedding, head and final norm."""
        tables: dict[str, int] = {}
        for name, shape in self.outside.items():
            low = name.lower()
            if len(shape) == 2 and self.width in shape and not _POSITION.search(low):
                tables[name] = shape[0] if shape[1] == self.width else shape[1]
        tables = {name: size for name, size in tables.items() if size >= 8}
        if self.component is not None:
            tables = {}
        vocab = self.config.get("vocab_size")
        heads = {n: v for n, v in tables.items() if _HEAD.search(module_of(n).lower()) and "token_emb" not in n}
        # A matrix with a bias beside it is a projection, such as the context_embedder of a diffusion model.
        rest = {n: v for n, v in tables.items() if n not in heads and _bias(n) not in self.outside}
        embeddings = {n: v for n, v in rest.items() if _EMBEDDING.search(n.lower())}
        embeddings = embeddings or {n: v for n, v in rest.items() if v == vocab}
        for name, found in (("embedding", embeddings), ("head", heads)):
            if found:
                best = max(found, key=lambda n: (found[n] == vocab, found[n]))
                if name == "embedding" or "embedding" not in self.parts or found[best] == embeddings_size(self):
                    self.parts[name] = TensorLocation(best)
        norms = [n for n, s in self.outside.items() if s == (self.width,) and _FINAL_NORM.search(n.lower())]
        norms = [n for n in norms if not n.endswith("bias")]
        # LFM calls its last norm that of the embedding; one that is indeed there has a bias in every published family.
        last = [n for n in norms if not re.search(r"emb", n.lower())]
        norms = last or [n for n in norms if _bias(n) not in self.outside]
        if norms:
            self.parts["final_norm"] = TensorLocation(min(norms, key=lambda n: (n.count("."), len(n))))
        if self.component is None and "embedding" not in self.parts:
            self.unknown["embedding"] = f"no table of tokens with {self.width} features was found"

    def _is_tied(self) -> bool:
        return (
            "head" not in self.parts
            and "embedding" in self.parts
            and self.config.get("tie_word_embeddings") is not False
        )

    def _add_norms(self, mlps: Mapping[int, Mlp]) -> Norm | None:
        """Adds the norms around the MLP, and returns what norms compute; None, with the reason, if that is unknown."""
        layers = [set(norms_of_layer(self.layers[layer], self.width)) for layer in (mlps or self.layers)]
        norms = sorted(set.intersection(*layers)) if layers else []
        if mlps:
            own = next(iter(mlps.values()))
            path = module_of(own.down.rest).split(".")[:-1]
            near = [n for n in norms for k in range(len(path), 0, -1) if n.startswith(".".join(path[:k]) + ".")]
            norms = list(dict.fromkeys(near)) if len(set(near)) == 1 else norms
        found = mlp_norms(norms, "final_norm" in self.parts)
        prefix = self.stack.pattern + "."
        for name, rest in (("mlp_norm", found.before), ("mlp_post_norm", found.after)):
            if rest is not None:
                self.parts[name] = TensorLocation(prefix + rest, how="by name")
        kind, why = self._kind_of_norm(norms)
        no_gains = not norms and self._says_rms() and all(map(without_gains, self.layers.values()))
        if not no_gains and (problem := found.problem or why):
            self.unknown["norm"] = problem
        return kind

    def _kind_of_norm(self, norms: Sequence[str]) -> tuple[Norm | None, str | None]:
        names = [
            self.stack.tensor(layer, rest) for layer in self.layers for rest in norms if rest in self.layers[layer]
        ]
        if not names:
            return None, None
        if all(_bias(name) in self.shapes for name in names[:4]):
            return "layer_norm", None
        known = NORM_OF_TYPE.get(str(self.config.get("model_type")))
        if known == "layer_norm":
            return known, None
        if known is None and not self._says_rms():
            return None, "no bias and nothing in the config determines whether norms subtract the mean"
        offset = guess_gain_offset(self.store.read_many([(name, ()) for name in names[:64]]))
        if offset is None:
            return None, "the signs of the gains do not determine whether they are stored minus one"
        return ("rms_unit_offset" if offset else "rms"), None

    def _says_rms(self) -> bool:
        by_name = any("rms" in key.lower() and value for key, value in self.config.items())
        return by_name or any(isinstance(value, str) and "rms" in value.lower() for value in self.config.values())

    def _check_features(self) -> None:
        """Notes why features may have an order of their own in every model: positions that are added by a rule."""
        tables = [
            n
            for n, s in self.outside.items()
            if len(s) == 2 and s[1] == self.width and re.search(r"pos|wpe", n.lower())
        ]
        rules = [name for name in tables if is_rule(self.store.read(name, (slice(0, 256),)))]
        known = bool(tables) or any(_ROPE_KEYS.search(key) and value for key, value in self.config.items())
        known = known or any(_ROPE_TENSORS.search(name.lower()) for name in self.shapes)
        known = known or any("alibi" in str(value).lower() for value in self.config.values() if isinstance(value, str))
        if rules:
            self.unknown["features"] = f"{rules[0]} follows a rule, which orders the features of every such model"
        elif not known:
            self.unknown["features"] = (
                "nothing determines how positions are given; if by a rule, they order features alike in all models"
            )

    def _is_in_out(self, mlps: Mapping[int, Mlp]) -> bool:
        """Returns whether matrices are stored `[in, out]`, by those of the MLPs, whose axes differ in size."""
        for layer, mlp in mlps.items():
            if mlp.units != self.width and not mlp.stacked and mlp.down.rest in self.layers[layer]:
                return self.layers[layer][mlp.down.rest][1] == self.width
        return False

    def _matrices(self, found: Description) -> Iterator[Matrix]:
        """Yields the other matrices with the features on one axis, of all layers."""
        prefix = self.stack.pattern + "."
        used = {part.tensor.removeprefix(prefix) for part in self.parts.values()}
        for layer, shapes in sorted(self.layers.items()):
            position = min(bisect.bisect_left(found.layers, layer), len(found.layers) - 1)
            for rest, shape in sorted(shapes.items()):
                pattern, number = expert_pattern(rest)
                if len(shape) != 2 or number is not None or pattern in used or _NO_MATRIX.search(rest.lower()):
                    continue
                if self.width not in shape or min(shape) < 16:
                    continue
                axis = shape.index(self.width)
                if shape[0] == shape[1]:
                    module = module_of(rest).lower()
                    if bool(_WRITES.search(module)) == bool(_READS.search(module)):
                        continue
                    axis = int(bool(_READS.search(module)) != found.in_out)
                    first = self.store.read(self.stack.tensor(layer, rest), (slice(0, _SAMPLED_ROWS),)).astype(
                        np.float32
                    )
                    if is_near_identity(first):
                        continue
                yield Matrix(self.stack.tensor(layer, rest), position, axis)


def _bias(tensor: str) -> str:
    """Returns the name that the bias beside a matrix or gain would have."""
    return re.sub(r"(weight|scale|gamma)$|$", lambda end: "bias" if end[0] else "_bias", tensor, count=1)


def embeddings_size(finder: _Finder) -> int:
    """Returns the number of tokens of the embedding that was found."""
    shape = finder.shapes[finder.parts["embedding"].tensor]
    return shape[0] if shape[1] == finder.width else shape[1]


def _sampled(layers: Sequence[int]) -> list[int]:
    places = np.linspace(0, len(layers) - 1, min(_SAMPLED, len(layers)))
    return [layers[int(place)] for place in places]


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the keys of a config and of the text config in it; outer ones last, so that they count."""
    for key, value in config.items():
        if isinstance(value, Mapping) and component_of(key) is None:
            yield from itertools.islice(_flat(value), 2000)
    yield from ((str(key), value) for key, value in config.items() if not isinstance(value, Mapping) or value)
