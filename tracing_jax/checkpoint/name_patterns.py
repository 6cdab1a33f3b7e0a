"""Names of tensors as training tools and multimodal models write them, without what the language model's lack."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.error_messages import counted, listed, shortened

# torch.compile, FSDP and activation checkpointing wrap a module, and their component is in the names of what is
# inside, at whatever depth. No module of a model is called so.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_ANY_OF_THEM = re.compile(r"_orig_mod|_wrapped_module|_forward_module|language_model|text_model")
_PARALLEL = "module."  # DataParallel and DeepSpeed: in front of every name, or of none
_LANGUAGE_MODEL = re.compile(r"(model\.)?(language_model|text_model)\.(?P<rest>.+)")

_LAYER = re.compile(r"\.(?:layers|h|blocks|blk)\.(\d+)\.|^(?:layers|h|blocks|blk)\.(\d+)\.")
_EXPERTS = re.compile(r"(?:\.experts\.(?:(\d+)\.)?|\.(?:input|output)_linear\.)")
_MOST_DIGITS = 9
_CONSTANT = re.compile(
    r".*rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)|.*\.(attn|attention)\.(masked_)?bias"
    r"|(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
)
_TABLES = re.compile(r"(.+\.)?((\w+_)?mask|(\w+_)?position_ids|relative_position_index|tid2eid)")
"""Tensors of integers that are no weights: masks, positions, the experts of each token in DeepSeek-V4."""

_OF_ACTIVATIONS = re.compile(
    r".*\.(([kvq]|kv|prob)_(scale|zero_point)|qscale_act"
    r"|(input|output|(input_|output_)?activation)_(global_)?(scale|zero_point|scale_ub))"
)
_IGNORED = {
    "heads for other tasks": re.compile(r"(v_head|value_head|score|classifier|reward_head|regression_head)\..+"),
    "scales of cached keys and values, or of activations": _OF_ACTIVATIONS,
    "of layers that predict further tokens": re.compile(r"(model\.mtp_layers|mtp)\..+"),
    "heads that predict further tokens": re.compile(r"medusa_heads?\..+"),
    "masks and positions, which follow from the config": re.compile(r"(.+\.)?(causal_mask|attn_mask|position_ids)"),
    "counters of training": re.compile(r"(.+\.)?(iteration|global_step|num_updates|num_batches_tracked)"),
    "parts for other inputs than text": re.compile(
        r"(model\.)?(vision_tower|vision_model|visual|vit|multi_modal_projector|mm_projector|image_newline|audio_tower"
        r"|speech_encoder|embed_vision|embed_audio|vision_embedder|image_tower|video_tower|connector"
        r"|visual_embeddings_table)(\..+)?"
    ),
}


def is_constant(name: str) -> bool:
    """Returns whether a tensor follows from the config: rotary frequencies and causal masks of old checkpoints."""
    return _CONSTANT.fullmatch(name) is not None


def is_of_activations(name: str) -> bool:
    """Returns whether a tensor quantises activations, or cached keys and values, and no weight."""
    return _OF_ACTIVATIONS.fullmatch(name) is not None


def is_table(name: str) -> bool:
    """Returns whether a tensor may hold integers by its name: positions, masks or indices, which are no weights."""
    return is_constant(name) or _TABLES.fullmatch(name) is not None


def may_be_absent(name: str) -> bool:
    """Returns whether an index may list a tensor that no shard holds: one that may follow from others."""
    return is_constant(name) or name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight"))


def ignored_notes(names: Iterable[str]) -> tuple[set[str], list[str]]:
    """Returns which of these extra tensors no language model reads, and a note on each kind of them."""
    found: dict[str, list[str]] = {}
    for name in names:
        for kind, pattern in _IGNORED.items():
            if pattern.fullmatch(name):
                found.setdefault(kind, []).append(name)
    notes = [
        f"{counted(len(members), 'tensor is', 'tensors are')} left out, {kind}: {listed(members, 3)}"
        for kind, members in found.items()
    ]
    return {name for members in found.values() for name in members}, notes


def plain_names(stored: Collection[str], wanted: Iterable[str]) -> dict[str, str]:
    """Returns the names that transformers gives to the tensors of a language model -> the names that they have here.

    Args:
      stored: the names in the files.
      wanted: those of the model. Where one of them is inside a `language_model`, as in a multimodal model, it stays.

    Raises:
      CheckpointError: two tensors would have the same name.
    """
    inside = any(_LANGUAGE_MODEL.fullmatch(name) for name in wanted)
    parallel = bool(stored) and all(_plain(name).startswith(_PARALLEL) for name in stored)
    plain = {name: _plain(name, parallel, inside) for name in stored}
    if twice := [name for name, count in Counter(plain.values()).items() if count > 1]:
        clash = [name for name, other in plain.items() if other == twice[0]]
        raise CheckpointError(
            f"{listed(clash)} would all be {shortened(twice[0])} without what training tools put in front; keep one"
        )
    return {other: name for name, other in plain.items()}


def _plain(name: str, parallel: bool = False, inside: bool = False) -> str:
    if not parallel and not _ANY_OF_THEM.search(name):
        return name
    name = _WRAPPER.sub("", name)
    while parallel and name.startswith(_PARALLEL):
        name = _WRAPPER.sub("", name.removeprefix(_PARALLEL))
    inner = _LANGUAGE_MODEL.fullmatch(name)
    if inner is None or inside:
        return name
    rest = inner["rest"]
    of_backbone = inner[1] and not rest.startswith(("model.", "lm_head."))
    return f"model.{rest}" if of_backbone else rest


def layer_number(name: str) -> int:
    """Returns the number of the layer that a tensor of this name belongs to; -1 if it belongs to none."""
    match = _LAYER.search(name)
    digits = (match[1] or match[2]) if match else ""
    return int(digits) if 0 < len(digits) < _MOST_DIGITS else -1


def num_experts_in(shapes: Mapping[str, Sequence[int]]) -> int:
    """Returns how many experts the tensors of these names and shapes can be of: one for each number, or one a row."""
    counts = [1]
    for name, shape in shapes.items():
        if match := _EXPERTS.search(name):
            digits = match[1] or ""
            counts.append(int(digits) + 1 if 0 < len(digits) < _MOST_DIGITS else shape[0] if shape else 0)
    return max(counts)


def num_layers_in(names: Iterable[str]) -> int:
    """Returns how many layers tensors of these names belong to."""
    return len({match[1] or match[2] for name in names if (match := _LAYER.search(name))})


def unknown_prefix(names: Collection[str], wanted: Collection[str]) -> str | None:
    """Returns the prefix of the names of all tensors that were expected without it; None if there is none."""
    some = [name for name in wanted if name not in names][:1]
    for expected in some:
        ends = [name.removesuffix(expected) for name in names if name.endswith(f".{expected}")]
        prefix = min(ends, key=len, default=None)
        if prefix and sum(prefix + name in names for name in wanted) * 2 > len(wanted):
            return prefix
    return None
