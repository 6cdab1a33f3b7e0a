"""Names of tensors, taken apart: which belong to the layers of the language model, and which to other components."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from tracing_jax.options import COMPONENTS

LAYER, EXPERT = "{layer}", "{expert}"
"""The placeholders of the number of a layer, and of an expert, in the name of a tensor of every layer."""

_COMPONENTS = {
    "vision": {"vision", "visual", "vit", "image", "images", "img", "siglip", "clip", "sam", "patch", "pixel"},
    "audio": {
        "audio",
        "speech",
        "whisper",
        "conformer",
        "codec",
        "mimi",
        "talker",
        "token2wav",
        "code2wav",
        "wav2vec2",
        "v2s",
    },
    "projector": {"projector", "connector", "resampler", "perceiver", "merger", "aligner", "modal", "mm", "multimodal"},
    "draft": {"mtp", "nextn", "eagle", "medusa", "draft"},
}
"""Component -> words of the names of its tensors, before the number of a layer."""

_LAYERED = re.compile(r"(?P<prefix>.*?)\.?\b(?P<number>\d+)\.(?P<rest>.+)")
_HAS_EXPERTS = re.compile(r"expert|ffn_(gate|up|down)$")


@dataclass
class Stack:
    """Tensors of layers that have one prefix: layer -> what follows its number -> the name of the tensor."""

    prefix: str
    layers: dict[int, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def tensor(self, layer: int, rest: str) -> str:
        """Returns the name of a tensor of a layer."""
        return self.layers[layer][rest]

    @property
    def pattern(self) -> str:
        """The name of a layer."""
        return f"{self.prefix}.{LAYER}" if self.prefix else LAYER


def component_of(name: str) -> str | None:
    """Returns the component that a tensor belongs to by its name; None for the language model."""
    layered = _LAYERED.fullmatch(name)
    words = set(re.split(r"[._]", (layered["prefix"] if layered else name).lower()))
    return next((component for component, known in _COMPONENTS.items() if words & known), None)


def names_of_component(names: Iterable[str], component: str | None) -> list[str]:
    """Returns the names of the tensors of a component; None: of the language model."""
    if component == "encoder":
        return [name for name in names if component_of(name) is None and "encoder" in name.split(".")]
    return [name for name in names if component_of(name) == component]


def sizes_of_components(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns component -> number of weights, of all that the tensors have besides a language model."""
    found: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        if (component := component_of(name)) in COMPONENTS:
            found[str(component)] += size
    stacks = stacks_of(names_of_component(sizes, None))
    tokens = {token for stack in stacks for token in stack.prefix.split(".")}
    if {"encoder", "decoder"} <= tokens:
        found["encoder"] = sum(sizes[name] for name in names_of_component(sizes, "encoder"))
    return dict(found)


def stacks_of(names: Iterable[str]) -> list[Stack]:
    """Returns the stacks of layers, by the prefix in front of the first number in a name."""
    found: dict[str, Stack] = {}
    for name in names:
        if match := _LAYERED.fullmatch(name):
            stack = found.setdefault(match["prefix"], Stack(match["prefix"]))
            stack.layers[int(match["number"])][match["rest"]] = name
    return list(found.values())


def main_stack(stacks: Collection[Stack], sizes: Mapping[str, int], encoder: bool = False) -> Stack | None:
    """Returns the stack with the most weights; a decoder before an encoder, unless the latter is asked for."""
    is_encoder = {stack.prefix: "encoder" in stack.prefix.split(".") for stack in stacks}
    if len(set(is_encoder.values())) > 1:
        stacks = [stack for stack in stacks if is_encoder[stack.prefix] == encoder]
    return max(
        (stack for stack in stacks if len(stack.layers)),
        key=lambda stack: sum(sizes[name] for layer in stack.layers.values() for name in layer.values()),
        default=None,
    )


def expert_pattern(rest: str) -> tuple[str, int | None]:
    """Returns a name in a layer with `{expert}` for the number of an expert, and this number; None if it has none."""
    tokens = rest.split(".")
    for i, token in enumerate(tokens[1:], 1):
        if token.isdigit() and _HAS_EXPERTS.search(tokens[i - 1]):
            return ".".join([*tokens[:i], EXPERT, *tokens[i + 1 :]]), int(token)
    return rest, None


def module_of(rest: str) -> str:
    """Returns the name of the module that has this tensor: without `weight`."""
    return re.sub(r"(^|\.)(weight|kernel|scale|gamma)$", "", rest)
