"""Published configs: each is read or refused with the cause, and what is read computes what transformers computes.

    python -m benchmarks.published_configs FILE [--only TYPE] [--write]

FILE is a JSON list of `{"source": ..., "config": ...}`. Of each config that transformers can build, a tiny random model
is made: sizes are shrunken, all else stays as it was published. It is saved under that config, opened as `compare`
opens models, and where it is read with a forward pass its logits must equal those of transformers. Of a config that
transformers cannot build, the tiny checkpoint has the tensors of `published_layouts`, and the parts that are found must
be those stated there. `--write` replaces the section on published configs in docs/families.md.
"""

import argparse
import collections
import copy
import json
import logging
import re
import tempfile
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks import published_layouts
from benchmarks.families import TABLE

HEADING = "## Published configs"

TOLERANCE = 2e-4
"""Of logits, times the larger of 1 and the largest."""

TOKENS = 24
_LAYERS, _VOCABULARY, _WIDTH, _HEAD, _WINDOW = 6, 320, 64, 16, 8

_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"), _VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "out_hidden_size", "projection_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "mlp_hidden_size", "ffn_dim"), 96),
    **dict.fromkeys(("ff_intermediate_size", "decoder_dim", "encoder_ffn_dim", "codebook_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_latent_size"), 48),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "sliding_window_size"), _WINDOW),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_n_heads", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD),
    **dict.fromkeys(("linear_num_key_heads", "n_groups", "mamba_num_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_head_dim", "index_head_dim"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "ssm_state_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_num_experts"), 8),
    **dict.fromkeys(("depth", "num_global_layers", "n_shared_experts", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 4096),
}
"""Attribute -> the most that it may be in a tiny model."""

_VISION: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "attention_heads"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim", "vision_output_dim"), 32),
    **dict.fromkeys(("intermediate_size", "num_position_embeddings"), 64),
}


@dataclass
class Row:
    """What became of a config.

    Attributes:
      source: where it was published.
      model_type: of the config.
      level: `forward`; `weights` where it has no forward pass here; `refused` where its tiny model is not opened.
      cause: why it is not read with a forward pass.
      opened: whether a tiny model of it was read.
      maker: what it was made from: `transformers`, or `names` of tensors.
      parts: what was found in it by its weights alone.
      misread: parts that were found elsewhere than they are, or not found.
      error: the largest difference of logits, relative to the largest; None where none were compared.
      remark: why no tiny model was tried.
    """

    source: str
    model_type: str
    level: str = ""
    cause: str = ""
    opened: bool = False
    maker: str = ""
    parts: str = ""
    misread: str = ""
    error: float | None = None
    remark: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it is read, and computes something else than transformers, or is taken apart otherwise."""
        return bool(self.misread) or (self.error is not None and not self.error <= TOLERANCE)


def shrunken(raw: Mapping[str, Any], vision: bool = False) -> dict[str, Any]:
    """Returns a config of a tiny model with the attributes of another.

    Args:
      raw: the other.
      vision: whether it is that of a vision tower.
    """
    found = {name: _shrunken(name, value, vision) for name, value in raw.items()}
    if vision:
        return found | {"fullatt_block_indexes": [0]} if "fullatt_block_indexes" in found else found
    _shrink_heads(raw, found)
    for name in ("num_experts_per_tok", "moe_k", "num_experts_per_token", "experts_per_token"):
        if isinstance(raw.get(name), int):
            found[name] = min(raw[name], 2)
    if isinstance(raw.get("n_group"), int) and raw["n_group"] > 1:
        found |= {"n_group": 4, "topk_group": 2 if raw.get("topk_group", 1) < raw["n_group"] else 4}
    if isinstance(raw.get("first_k_dense_replace"), int):
        found["first_k_dense_replace"] = min(raw["first_k_dense_replace"], 1)
    _shrink_rope(found)
    return found


def _shrunken(name: str, value: Any, vision: bool) -> Any:
    if isinstance(value, dict):
        inner = vision or "vision" in name or "audio" in name
        nested = name in ("rope_parameters", "rope_scaling", "quantization_config", "id2label", "auto_map")
        return dict(value) if nested else shrunken(value, inner)
    if vision:
        return min(value, _VISION[name]) if name in _VISION and isinstance(value, int) else value
    if isinstance(value, list) and re.search(r"layer|pattern|_freq", name) and len(value) > _LAYERS:
        found = _of_every_kind(value)
        # Nemotron-H has an MLP behind all others.
        return [*found[:-2], found[-1], value[-1]] if name == "layers_block_type" and found[-1] != value[-1] else found
    if isinstance(value, str) and name == "hybrid_override_pattern":
        return "M*-E"[: _LAYERS - 2] if "E" in value else "M*-"
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.search(r"_token_(id|index)$", name):
        return min(value, _VOCABULARY - 1)
    if name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        return min(value, _LAYERS)
    return min(value, _SIZES.get(name, value))


def _of_every_kind(values: list[Any]) -> list[Any]:
    """Returns the first values of a list with one for each layer; what does not occur in them takes the last places."""
    kept, missing = values[:_LAYERS], []
    for value in values:
        if value not in kept and value not in missing and not isinstance(value, int):
            missing.append(value)
    return kept[: _LAYERS - len(missing)] + missing[:_LAYERS]


def _shrink_heads(raw: Mapping[str, Any], found: dict[str, Any]) -> None:
    for width, heads, kv_heads in (
        ("hidden_size", "num_attention_heads", "num_key_value_heads"), ("n_embd", "n_head", "num_key_value_heads"),
        ("d_model", "n_heads", "num_kv_heads"),
    ):  # fmt: skip
        if not isinstance(raw.get(heads), int):
            continue
        found[heads] = 4
        if isinstance(raw.get(kv_heads), int):
            found[kv_heads] = 4 if raw[kv_heads] == raw[heads] else 1 if raw[kv_heads] == 1 else 2
        if isinstance(raw.get("head_dim"), int):  # other than the usual where it is so in the config
            usual = raw["head_dim"] * raw[heads] == raw.get(width)
            found["head_dim"] = _HEAD if usual else 2 * _HEAD


def _shrink_rope(found: dict[str, Any]) -> None:
    """Cuts factors of single frequencies, and sections of a rope, to the number of frequencies."""
    heads = found.get("num_attention_heads") or 4
    width = found.get("head_dim") or (found.get("hidden_size") or _WIDTH) // heads
    width = found.get("qk_rope_head_dim") or width
    for name in ("rope_scaling", "rope_parameters"):
        rope = found.get(name)
        if not isinstance(rope, dict):
            continue
        share = rope.get("partial_rotary_factor") or found.get("partial_rotary_factor") or 1
        frequencies = int(width * share) // 2
        for factors in ("short_factor", "long_factor"):
            if isinstance(rope.get(factors), list):
                rope[factors] = rope[factors][:: max(1, len(rope[factors]) // frequencies)][:frequencies]
        if isinstance(rope.get("mrope_section"), list):
            third = frequencies // 3
            rope["mrope_section"] = [frequencies - 2 * third, third, third]


def tiny_model(folder: Path, seed: int) -> Any:
    """Returns transformers' model of the config in a folder, with random weights in float32.

    Raises:
      Exception: whatever transformers raises where it has no such model, or refuses the config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    from tracing_jax.arch.config import _hf_config

    config = _named_config(folder) or _hf_config(folder)
    if hasattr(config, "quantization_config"):  # says how weights were stored, and random ones are not
        del config.quantization_config
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    maker = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    if not whole and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        import transformers

        build = getattr(transformers, config.architectures[0])._from_config
    else:
        build = maker.from_config
    # With plain attention, transformers 5.24 adds the slopes of Falcon's ALiBi twice, with its default once.
    how = {"attn_implementation": "sdpa" if getattr(config, "alibi", False) else "eager"}
    with torch.device("meta"):
        empty = build(copy.deepcopy(config), **how)
    if (size := sum(p.numel() for p in empty.parameters())) > 50_000_000:
        raise ValueError(f"{size:,} weights: it does not get small")
    torch.manual_seed(seed)
    model = build(config, **how, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            drawn = torch.randn(weights.shape, generator=generator)
            if weights.ndim >= 2:
                weights.copy_(drawn * 0.15)
            elif "A_log" not in name:
                weights.add_(0.2 * drawn)
        for name, values in model.named_buffers():
            if "correction_bias" in name:
                values.copy_(0.3 * torch.randn(values.shape, generator=generator))
    return model


def _named_config(folder: Path) -> Any:
    """Returns the config of the class that `architectures` names; None if it is that of `model_type`."""
    import transformers

    raw = json.loads((folder / "config.json").read_text())
    names = raw.get("architectures")
    named = getattr(transformers, names[0], None) if isinstance(names, list) and names else None
    known = getattr(named, "config_class", None)
    if known is None or known.model_type == raw.get("model_type"):
        return None
    return known(**{name: value for name, value in raw.items() if name not in ("model_type", "quantization_config")})


def tried(entry: Mapping[str, Any], seed: int = 0) -> Row:
    """Returns what becomes of a config and of a tiny model of it."""
    raw = entry["config"]
    row = Row(entry["source"], str(raw.get("model_type")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _read_config(row, folder, raw)
        small = shrunken(raw)
        if isinstance((inner := small.get("ffn_config") or {}).get("ffn_act_fn"), str):  # not as DBRX's class takes it
            inner["ffn_act_fn"] = {"name": inner["ffn_act_fn"]}
        (folder / "config.json").write_text(json.dumps(small))
        if row.model_type in published_layouts.LAYOUTS:
            tensors, parts = published_layouts.tensors(small, _LAYERS, seed)
            (folder / "model").mkdir()
            save_file(tensors, folder / "model" / "model.safetensors")
            row.maker = "names"
            _open_model(row, folder, small, None, parts)
            return row
        try:
            model = tiny_model(folder, seed)
        except Exception as error:
            row.remark = f"no tiny model: {_short(error)}"
            return row
        row.maker = "transformers"
        model.save_pretrained(folder / "model")
        _open_model(row, folder, small, model)
    return row


def _read_config(row: Row, folder: Path, raw: Mapping[str, Any]) -> None:
    """Notes whether the config as published is supported."""
    from tracing_jax.arch import UnsupportedModelError, read_arch

    (folder / "config.json").write_text(json.dumps(raw))
    try:
        read_arch(folder)
        row.level = "forward"
    except UnsupportedModelError as error:
        row.level, row.cause = "weights", _short(error).replace(f"{folder}/", "")


def _open_model(
    row: Row, folder: Path, small: Mapping[str, Any], model: Any, stated: Mapping[str, str] | None = None
) -> None:
    """Notes whether the tiny model is read, and what it computes, or what was found in it.

    Args:
      row: to be filled in.
      folder: of the model's folder.
      small: its config.
      model: transformers' model of it; None if there is none.
      stated: part -> the name of its tensor, where it is known.
    """
    from tracing_jax.checkpoint import CheckpointError, WeightsOnly, open_checkpoint

    saved = folder / "model"
    plain = {name: value for name, value in small.items() if name != "quantization_config"}
    (saved / "config.json").write_text(json.dumps(plain))
    try:
        found = open_checkpoint(str(saved), weights_only=WeightsOnly())
    except CheckpointError as error:
        row.level, row.cause = "refused", _short(error).replace(str(folder), "")
        return
    row.opened = True
    level = "forward" if found.arch.reading is None else "weights"
    if level != row.level:
        row.remark = f"the tiny model is read at another level: {level} {found.notes[:1]}"
    elif level == "forward":
        row.error = difference(found, expected_logits(model))
    if level == "weights":
        parts = parts_found(found.notes)
        row.parts = ", ".join(name for name in PARTS if name in parts) or "other matrices alone"
        wanted = {name: parts.get(name) for name in PARTS} if stated is None else {n: stated.get(n) for n in PARTS}
        row.misread = "; ".join(
            f"{name} is {wanted[name]}, found {parts.get(name)}" for name in PARTS if parts.get(name) != wanted[name]
        )


PARTS = ("gate", "up", "down", "embedding", "head")
"""The parts that are compared with those stated."""


def parts_found(notes: Sequence[str]) -> dict[str, str]:
    """Returns part -> where it is stored, by the notes of a checkpoint that was read by its weights alone."""
    return {name: where for note in notes for name, where in re.findall(r"(\w+) = ([^\[;]+?) \[", note)}


def tokens() -> np.ndarray:
    """Returns the text, int32, on which logits are compared."""
    return np.random.default_rng(0).integers(2, 200, (2, TOKENS)).astype(np.int32)


def expected_logits(model: Any) -> np.ndarray:
    """Returns the logits of transformers' model."""
    import torch

    # That of Llama 4 asks for what only images give, in transformers 5.24.
    whole = model.language_model if model.config.model_type == "llama4" else model
    with torch.no_grad():
        return np.asarray(whole(input_ids=torch.tensor(tokens().astype(np.int64)), use_cache=False).logits)


def difference(found: Any, expected: np.ndarray) -> float:
    """Returns how far logits of a checkpoint are from those expected, relative to the largest."""
    import jax

    from tracing_jax.forward import logits
    from tracing_jax.sources import InMemory, in_memory

    source = InMemory(found.arch, jax.tree.map(jax.numpy.asarray, in_memory(found).params))
    with jax.disable_jit():  # compiling so many small models would take most of the time
        ours = logits(source, tokens())
    return float(np.abs(ours - expected).max() / max(1.0, np.abs(expected).max()))


def _short(error: BaseException) -> str:
    line = " ".join(str(error).split()).split("; supported: ")[0]
    return line if len(line) < 400 else line[:400] + " ..."


_SECTION = """Of {total} configs of {types} model types, as they were published from 2023 to 2026, {forward} are read
with a forward pass. {compared} of these were made into tiny random models by transformers, with every attribute but
sizes as published: {right} give its logits to within 2e-4 of the largest (the worst: {worst:.0e}), {wrong} do not.
{without} have no forward pass here, each for the cause in the first table. Of these a tiny checkpoint was made by
transformers or, where transformers cannot build it, with the names and shapes of the published tensors
(`benchmarks/published_layouts.py`){untried}. {opened} were read by their weights alone, as the
second table says; {refused} were refused. Of the {named} made from names, {misread} had a part that was not found where
it is.

`python -m benchmarks.published_configs FILE --write`, where FILE is a list of such configs, which are not part of this
repository."""


def section(rows: Sequence[Row]) -> str:
    """Returns the section of the docs."""
    errors = [row.error for row in rows if row.error is not None]
    without = [row for row in rows if row.level != "forward"]
    text = _SECTION.format(
        total=len(rows),
        types=len({row.model_type for row in rows}),
        forward=sum(row.level == "forward" for row in rows),
        without=len(without),
        opened=sum(row.opened for row in without),
        refused=sum(row.level == "refused" for row in without) or "none",
        untried=f"; of {count} none was made" if (count := sum(not row.maker for row in without)) else "",
        named=sum(row.maker == "names" for row in without),
        misread=sum(bool(row.misread) for row in without) or "none",
        compared=len(errors),
        right=sum(error <= TOLERANCE for error in errors),
        wrong=sum(not error <= TOLERANCE for error in errors) or "none",
        worst=max(errors, default=0.0),
    )
    causes = collections.Counter(_cause(row) for row in without)
    lines = ["| why without a forward pass | configs |", "|---|---|"]
    lines += [f"| {cause} | {count} |" for cause, count in causes.most_common()]
    kinds = collections.Counter((row.model_type, row.maker or "nothing", _found(row)) for row in without)
    others = ["| model type | tiny checkpoint from | found by weights alone | configs |", "|---|---|---|---|"]
    others += [f"| {' | '.join(kind)} | {count} |" for kind, count in sorted(kinds.items())]
    paragraphs = [
        textwrap.fill(" ".join(part.split()), 120, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    ]
    return "\n\n".join([HEADING, *paragraphs, "\n".join(lines), *(["\n".join(others)] if without else [])]) + "\n"


def _found(row: Row) -> str:
    """Returns what was found in the tiny checkpoint of a config, or why there is none."""
    if row.opened:
        return f"{row.parts}; not as it is: {row.misread}" if row.misread else row.parts
    return row.cause if row.level == "refused" else row.remark.split(". ")[0][:160]


def _cause(row: Row) -> str:
    """Returns the cause of a row in short, the same for all models of a kind."""
    if "is not supported" in row.cause and row.cause.startswith("config.json: architecture"):
        return f"a family without a forward pass here: {row.model_type}"
    return row.cause.removeprefix("config.json: ").split(";")[0]


def main() -> None:
    """Prints what became of each config, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="a JSON list of published configs")
    parser.add_argument("--only", help="of these only configs of one model type")
    parser.add_argument("--write", action="store_true", help=f"write the counts into {TABLE.name}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.only and options.write:
        parser.error("--write with --only: the page holds the counts of all configs; leave one of them out")
    entries = json.loads(options.file.read_text(encoding="utf-8"))
    rows = []
    for entry in entries:
        if options.only is None or entry["config"].get("model_type") == options.only:
            rows.append(tried(entry))
            row = rows[-1]
            error = "" if row.error is None else f"{row.error:.1g}"
            mark = "WRONG " if row.is_wrong else ""
            print(f"{mark}{row.model_type} {row.level} {error} | {row.source} | {row.cause} | {row.remark}", flush=True)
    print("\n" + section(rows))
    if options.write:
        page, _, _ = TABLE.read_text(encoding="utf-8").partition(HEADING)
        TABLE.write_text(page.rstrip() + "\n\n" + section(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
