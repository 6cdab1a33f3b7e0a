"""LoRA adapters (PEFT): which of their tensors changes which tensor of the base, and how.

`merged_tensors` does it as the base is read. Source: Hu et al., LoRA (2021), section 4.1; `use_rslora`: Kalajdzievski,
rsLoRA (2023), section 3; `use_dora`: Liu et al., DoRA (2024), equation 5.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tracing_jax.checkpoint.adapted_experts import with_adapted_experts
from tracing_jax.checkpoint.added_tokens import Ends, check_added_tokens, saved_again, shapes_with_tokens
from tracing_jax.checkpoint.derived_tensors import Alias, DerivedTensors
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.merged_tensors import LowRank, MergedTensors, Updates, olora, pissa
from tracing_jax.checkpoint.name_patterns import ignored_notes, plain_names
from tracing_jax.checkpoint.tensors import TensorStore, listing, open_file, read_json
from tracing_jax.error_messages import grouped, shortened

_CONFIG = "adapter_config.json"
_HANDLED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "bias"),
    *("init_lora_weights", "base_model_name_or_path", "revision", "use_dora", "lora_bias", "trainable_token_indices"),
    "target_parameters",
}
# They steer training, or choose modules, which the adapter's tensors name themselves.
_NEUTRAL = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules"),
    *("modules_to_save", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying", "loftq_config"),
}
_BIASES = ("none", "all", "lora_only")
"""Which biases of the base were trained; the adapter holds them whole, and those that it lacks are the base's."""

_INITS_BESIDE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# These change the weights of the base as well, by a rule; LoftQ, CorDA, LoRA-GA and `pissa_niter_N` by data or chance.
_INITS_OF_THE_BASE = {"pissa": pissa, "olora": olora}
_NAME = re.compile(
    r"base_model\.model\.(?P<path>.+?)\."
    r"(lora_(?P<factor>(embedding_)?[AB]|magnitude_vector)(\.default)?(?P<kind>\.weight|\.bias)?"
    r"|(?P<tokens>token_adapter\.trainable_tokens_delta(\.default)?)"
    r"|(modules_to_save\.(default\.)?|base_layer\.)?(?P<leaf>weight|bias))"
)


_AT_THE_ENDS = re.compile(
    r"lora_embedding_|token_adapter|embed|\b(wte|wpe|lm_head|output_layer)\.|^base_model\.model\.output\."
)
"""In the name of a tensor of an adapter: it changes the embedding or the head."""


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a PEFT adapter, which is only an update of its base model."""
    return (folder / _CONFIG).is_file()


def base_id(folder: Path) -> str:
    """Model id of the adapter's base: `org/name`, `org/name@revision` or a folder.

    Raises:
        CheckpointError: The adapter does not name its base.
    """
    config = read_json(folder / _CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / _CONFIG}: base_model_name_or_path is missing; enter the id of the base model")
    return f"{name}@{revision}" if revision else name


def merged(
    base: TensorStore, folder: Path, ends: Ends | None = None, *, tied: bool = False, shared: bool = True
) -> TensorStore:
    """`base` with the adapter in `folder` merged as it is read, in float32, then cast back to the base's dtype.

    Where the base ties its head to its embedding and the adapter trained one of them, both are in the result: PEFT
    leaves the other as it was in the base.

    Args:
        base: The tensors of the base.
        folder: Of the adapter.
        ends: Names of the embedding and of the head, where they are known; they may have more rows in the adapter.
        tied: Whether the config of the base ties them.
        shared: Whether they are one tensor then; some checkpoints store a head of their own all the same.

    Raises:
        CheckpointError: The adapter is no plain LoRA or does not fit `base`; every reason at once.
    """
    config = read_json(folder / _CONFIG)
    problems = _config_problems(config)
    if problems:
        raise CheckpointError(*(f"{folder / _CONFIG}: {problem}" for problem in problems))
    adapter = _open_adapter(folder)
    if ends and tied and shared and any(_trains(name, ends) for name in adapter.names()):
        base = _with_both(base, *ends)
    try:
        base, adapter = with_adapted_experts(base, adapter, config)
        updates = _planned_updates(base, adapter, config, ends, tied, shared)
        return MergedTensors(base, adapter, updates, [folder / _CONFIG])
    except CheckpointError as error:
        raise CheckpointError(*(f"{adapter.files()[0]}: {problem}" for problem in error.problems)) from error


def merged_by_weights(base: TensorStore, folder: Path, config: Mapping[str, Any]) -> TensorStore:
    """As `merged`, of a base that is read by its weights alone, of which it is not known how its head is tied.

    Args:
        base: The tensors of the base, under plain names.
        folder: Of the adapter.
        config: Of the base, as plain data.

    Raises:
        CheckpointError: As `merged`; or the adapter trained the embedding or the head, and they may be tied.
    """
    trained = [name for name in _open_adapter(folder).names() if _AT_THE_ENDS.search(name)]
    if trained and config.get("tie_word_embeddings") is not False:
        raise CheckpointError(
            f"{folder}: {shortened(trained[0])} changes the embedding or the head of a base that is read by its "
            "weights alone, and they may be tied; merge it with PEFT"
        )
    return merged(base, folder)


def _trains(name: str, ends: Ends) -> bool:
    """Returns whether a tensor of an adapter belongs to the embedding or the head."""
    match = _NAME.fullmatch(name)
    return match is not None and any(one.endswith(f"{match['path'].rpartition('.')[2]}.weight") for one in ends)


def _with_both(base: TensorStore, embedding: str, head: str) -> TensorStore:
    names = base.names()
    if head not in names:
        return DerivedTensors(base, {head: Alias(base, embedding)})
    return base if embedding in names else DerivedTensors(base, {embedding: Alias(base, head)})


def _open_adapter(folder: Path) -> TensorStore:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return open_file(folder / name)
    raise CheckpointError(f"{folder}: no adapter_model.safetensors or adapter_model.bin, found {listing(folder)}")


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    """Reasons why the adapter is not W + scaling * B A alone; a setting that is not known here must be off."""
    if config.get("peft_type") != "LORA":
        return [f"peft_type {config.get('peft_type')!r}, only 'LORA' is merged; merge it with PEFT"]
    problems = [
        f"{key} = {value!r} is not merged here and may change the weights; merge it with PEFT"
        for key, value in config.items()
        if value and key not in _HANDLED | _NEUTRAL
    ]
    if config.get("bias", "none") not in _BIASES:
        problems.append(f"bias = {config['bias']!r}, expected one of {', '.join(_BIASES)}; merge it with PEFT")
    init = _init(config)
    if init not in (*_INITS_BESIDE_THE_BASE, *_INITS_OF_THE_BASE):
        problems.append(
            f"init_lora_weights = {init!r} changes the base too, in a way that cannot be repeated; convert the adapter "
            "to plain LoRA with PEFT"
        )
    if init == "olora" and config.get("fan_in_fan_out"):
        problems.append("init_lora_weights = 'olora' with fan_in_fan_out is not merged; merge it with PEFT")
    for key in ("r", "lora_alpha"):
        problems += _number_problem(key, config.get(key))
    for key in ("rank_pattern", "alpha_pattern"):
        problems += _patterns_problems(key, config.get(key) or {})
    return problems


def _init(config: Mapping[str, Any]) -> Any:
    """Returns how the factors were initialised; PEFT takes `OLoRA` in any case of letters."""
    init = config.get("init_lora_weights")
    return "olora" if isinstance(init, str) and init.lower() == "olora" else init


def _number_problem(key: str, value: object) -> list[str]:
    good = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return [] if good else [f"{key} = {value!r}, expected a positive number"]


def _patterns_problems(key: str, patterns: object) -> list[str]:
    """The patterns are untrusted input: nested repeats can make a match take exponential time."""
    if not isinstance(patterns, dict):
        return [f"{key} = {patterns!r}, expected numbers by pattern"]
    problems = []
    for pattern, value in patterns.items():
        problems += _number_problem(f"{key}[{pattern!r}]", value)
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > 2:
            problems.append(f"{key}: {pattern!r} repeats too much; write the module's name")
            continue
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            problems.append(f"{key}: {pattern!r} is no regular expression")
    return problems


def _planned_updates(
    base: TensorStore, adapter: TensorStore, config: Mapping[str, Any], ends: Ends | None, tied: bool, shared: bool
) -> Updates:
    """Returns what the tensors of an adapter do to those of its base.

    Raises:
        CheckpointError: They do not fit; every reason at once.
    """
    parts, problems = _parts(base, adapter)
    shapes = shapes_with_tokens(base, adapter, parts, ends)
    updates = Updates()
    for target, names in parts.items():
        try:
            if "whole" in names:
                updates.replaced[target] = names.pop("whole")
                _expect_shape(adapter, updates.replaced[target], shapes[target])
            if "tokens" in names:
                updates.rows[target] = _token_rows(adapter, names.pop("tokens"), shapes[target], config)
            if "B_bias" in names:
                updates.added[target] = _added(adapter, names.pop("B_bias"), shapes[target], config)
            if names:
                updates.low_rank[target] = _low_rank(adapter, names, shapes[target], config)
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(*grouped(problems))
    # The weight below the factors of one of two tied modules is that of both, and trained tokens are those of both, for
    # which PEFT asks the config alone; a module that was saved whole is no longer tied.
    for one, other in (ends, ends[::-1]) if ends and tied else ():
        if shared and ".base_layer." in updates.replaced.get(one, "") and other not in updates.replaced:
            updates.replaced[other] = updates.replaced[one]
        if one in updates.rows and not {other} & {*updates.rows, *updates.replaced}:
            updates.rows[other] = updates.rows[one]
    check_added_tokens(base, adapter, updates.replaced, ends)
    return updates


def _parts(base: TensorStore, adapter: TensorStore) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Names of the adapter's tensors by base tensor and part ("A", "embedding_A", "whole"); and what fits nowhere."""
    known = set(base.names())
    parts: dict[str, dict[str, str]] = {}
    problems = []
    left_out, notes = ignored_notes(map(_inside_the_model, adapter.names()))
    for note in notes:
        logging.info("%s: %s", adapter.files()[0], note)
    twice = saved_again(adapter.names())
    for name in adapter.names():
        if _inside_the_model(name) in left_out or name in twice:
            continue
        match = _NAME.fullmatch(name)
        kind, leaf = _part_of(match) if match else ("", "")
        target = _target(f"{match['path']}.{leaf}", known) if match else None
        if not match or not target:
            why = "a bias of lora_B can be merged only into a bias" if kind == "B_bias" else "is it the right base?"
            problems.append(f"{shortened(repr(name), 200)} belongs to no tensor of the base; {why}")
        elif parts.setdefault(target, {}).setdefault(kind, name) != name:
            problems.append(f"{name!r} is the second of its kind for {target!r}")
    return parts, problems


def _inside_the_model(name: str) -> str:
    """Returns the name of a tensor of an adapter that was saved whole as the model itself has it."""
    return re.sub(r"\bmodules_to_save\.(default\.)?", "", name.removeprefix("base_model.model."))


def _part_of(match: re.Match[str]) -> tuple[str, str]:
    """Returns which part of an update a tensor is, and the last component of the base's tensor."""
    if match["factor"] == "B" and match["kind"] == ".bias":
        return "B_bias", "bias"
    if match["factor"]:
        return match["factor"], "weight"
    return ("tokens", "weight") if match["tokens"] else ("whole", match["leaf"])


def _target(name: str, known: set[str]) -> str | None:
    """`name` as the base spells it: checkpoints of a bare backbone (GPT-2) lack the first component."""
    plain = next(iter(plain_names([name], ())))  # without `language_model`, as the names of the base
    return next((spelling for spelling in (name, name.partition(".")[2], plain) if spelling in known), None)


def _low_rank(
    adapter: TensorStore, names: Mapping[str, str], shape: tuple[int, ...], config: Mapping[str, Any]
) -> LowRank:
    names = dict(names)
    first = next(iter(names.values()))
    magnitude = names.pop("magnitude_vector", None)
    paths = {match["path"] for name in names.values() if (match := _NAME.fullmatch(name))}
    if set(names) not in ({"A", "B"}, {"embedding_A", "embedding_B"}) or len(paths) != 1:
        raise CheckpointError(f"{first!r} lacks its partner, expected lora_A and lora_B; download the adapter again")
    if len(shape) != 2:
        raise CheckpointError(f"{first!r} updates a tensor of shape {shape}, only matrices are merged")
    is_embedding = "embedding_A" in names
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(f"{first!r}: a magnitude vector belongs to DoRA, and DoRA has one (use_dora)")
    transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    (path,) = paths
    rank = _by_pattern(config.get("rank_pattern"), path, config["r"])
    a, b = sorted(names.values())
    size_out, size_in = shape[::-1] if transposed else shape
    _expect_shape(adapter, a, (rank, size_in))
    _expect_shape(adapter, b, (size_out, rank))
    if magnitude:
        _expect_shape(adapter, magnitude, (size_out,))
    init = None if is_embedding else _INITS_OF_THE_BASE.get(_init(config))
    scaling = _scaling(config, path)
    subtracted = functools.partial(init, rank=rank, scaling=scaling) if init else None
    return LowRank(a, b, scaling, transposed, magnitude, subtracted)


def _scaling(config: Mapping[str, Any], path: str) -> float:
    """Returns what the product of the factors of a module is multiplied by."""
    rank = _by_pattern(config.get("rank_pattern"), path, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _added(adapter: TensorStore, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the bias of a factor B (`lora_bias`), which the bias of the module gets, and its scaling."""
    _expect_shape(adapter, name, shape)
    match = _NAME.fullmatch(name)
    assert match is not None, "it was found by this pattern"
    return name, _scaling(config, match["path"])


def _token_rows(
    adapter: TensorStore, name: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[str, np.ndarray]:
    """Returns the trained rows of an embedding (`trainable_token_indices`) and their indices."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        modules = [module for module in indices if f".{module}.token_adapter" in name]
        indices = indices[modules[0]] if len(modules) == 1 else None
    rows = indices if isinstance(indices, list) else []
    if not rows or not all(type(i) is int and 0 <= i < shape[0] for i in rows) or len({*rows}) < len(rows):
        raise CheckpointError(f"{name!r}: trainable_token_indices = {shortened(indices)}, expected rows of {shape}")
    _expect_shape(adapter, name, (len(rows), shape[1]))
    return name, np.array(rows, np.int64)


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Value of the first pattern that matches the end of `path`, from the start of a component on."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(matches, default)


def _expect_shape(adapter: TensorStore, name: str, expected: tuple[int, ...]) -> None:
    if adapter.shape(name) != expected:
        raise CheckpointError(f"{name!r} has shape {adapter.shape(name)}, expected {expected} by the base and the rank")
