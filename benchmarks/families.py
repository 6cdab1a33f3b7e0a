"""Every family of text generation that transformers registers: what becomes of a pair of tiny models of it?

    python -m benchmarks.families [--families llama,mamba] [--write]

For each family three tiny random models are written: one, a copy of it whose MLP units were permuted and whose weights
have noise, and an independent one. `compare` must call the first two related, or say why it cannot tell, and must never
call the independent ones related. The copy is permuted by names of modules, on tensors of torch, without this package,
and its logits are compared with those of the original before the noise is added. `--write` makes docs/families.md.
"""

import argparse
import contextlib
import io
import json
import logging
import re
import signal
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pairs.tokenizer import write_tokenizer
from tracing_jax.dataclass_options import comma_list

NOISE = 0.02
"""Of a fine-tuned copy, in standard deviations of each tensor."""

_SECONDS = 240
_VOCABULARY = 320
TABLE = Path(__file__).parent.parent / "docs" / "families.md"

_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), _VOCABULARY),
    **dict.fromkeys(("decoder_vocab_size",), _VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "n_embed", "lru_width"), 64),
    **dict.fromkeys(("embedding_size", "attention_hidden_size", "word_embed_proj_dim", "emb_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner", "decoder_ffn_dim", "inner_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "ffn_hidden_size", "dff", "dim_ff", "block_ff_dim"), 96),
    **dict.fromkeys(("shared_intermediate_size",), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_intermediate_size"), 96),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "kv_channels", "attention_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"), 1),
}
"""Attribute of a config -> its value in a tiny model, where the class has it."""


_MAY_BE_NONE = ("head_dim", "num_key_value_heads", "attention_head_dim", "kv_channels")
"""Attributes that are set in a tiny model even where the class leaves them open."""

_MAMBA = {"mamba_d_head": 32, "mamba_n_heads": 4, "mamba_d_ssm": 128, "mamba_expand": 2}
_QWEN4 = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32,
    "indexer_compress_ratio": 4, "output_gate_type": "sigmoid",
}  # fmt: skip
_OWN_SIZES: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2}, "deepseek_v3": {"num_key_value_heads": 4},
    "bamba": _MAMBA, "falcon_h1": _MAMBA, "granitemoehybrid": _MAMBA, "mamba2": {"head_dim": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "nemotron_h": {"n_groups": 2, "layer_types": ["linear_attention", "mlp", "full_attention", "moe"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "qwen4_exp_text": _QWEN4, "qwen4_exp": {"text_config": _QWEN4},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 96}},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "mamba_dt_rank": 4},
    "xlstm": {"embedding_dim": 64, "num_blocks": 3},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "longcat_flash": {"expert_ffn_hidden_size": 96, "zero_expert_num": 2, "qk_head_dim": 32, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1}, "xlnet": {"d_head": 16},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
}  # fmt: skip
"""Family -> sizes that go together in it."""

_ASSISTANT = {
    "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 16,
}  # fmt: skip
_DOTS = {
    "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96,
    "shared_experts_intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 32, "index_head_dim": 16,
    "index_n_heads": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    "sliding_window_size": 16, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_GEMMA4_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_MADE_WITH: Mapping[str, Mapping[str, Any]] = {
    "dots3_note": {
        "text_config": _DOTS, "audio_config": {"adapter_out_dim": 64}, "vision_config": {"adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS,
    "gemma4_assistant": {"backbone_hidden_size": 64, "text_config": {**_ASSISTANT, **_GEMMA4_ASSISTANT}},
    "gemma4_unified_assistant": {"backbone_hidden_size": 64, "text_config": _ASSISTANT},
}  # fmt: skip
"""Family -> arguments of its config class, where attributes that are changed one after another do not go together."""


@dataclass
class Row:
    """What became of a family.

    Attributes:
      family: its model type.
      level: `forward`, `weights`, or how it was not tried.
      related, independent: the verdicts on the copy, and on the independent model.
      tests: the statistics that ran.
      strongest: of them, the one with the smallest p-value on the copy.
      cause: why nothing could be tried, or be told.
    """

    family: str
    level: str = ""
    related: str = ""
    independent: str = ""
    tests: str = ""
    strongest: str = ""
    cause: str = ""

    @property
    def outcome(self) -> str:
        """`right`, `undecided`, `refused`, `not tried` or `wrong`."""
        if self.related in ("", "not tried"):
            return "not tried" if self.level in ("", "not tried") else "refused"
        if self.independent in ("related", "identical") or self.related == "no_evidence":
            return "wrong"
        return {"related": "right", "not_testable": "refused"}.get(self.related, "undecided")


def tiny_config(family: str) -> Any:
    """Returns the config of a tiny model of a family.

    Raises:
      Exception: whatever transformers raises where the sizes do not go together.
    """
    from transformers import CONFIG_MAPPING

    if family in _MADE_WITH:
        return CONFIG_MAPPING[family](**_MADE_WITH[family])
    config = CONFIG_MAPPING[family]()
    _shrink(config)
    for name, value in _OWN_SIZES.get(family, {}).items():
        inner = vars(config).get(name)
        if hasattr(inner, "to_dict"):
            for part, size in value.items():
                setattr(inner, part, size)
        else:
            setattr(config, name, value)
    return config


def _shrink(config: Any) -> None:
    layers = 3
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _shrink(value)
        elif name in _SIZES and ((isinstance(value, int) and not isinstance(value, bool)) or name in _MAY_BE_NONE):
            with contextlib.suppress(Exception):
                setattr(config, name, _SIZES[name])
        elif name in _SIZES and isinstance(value, list):  # a size for each layer
            setattr(config, name, [_SIZES[name]] * layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) > layers and re.search(r"layer|block|pattern|_list", name):
            kinds = list(dict.fromkeys(map(str, value)))
            kept = value[:layers]
            for i, kind in enumerate(kinds[:layers]):  # of every kind one
                if kind not in map(str, kept):
                    kept[-1 - i] = next(v for v in value if str(v) == kind)
            with contextlib.suppress(Exception):
                setattr(config, name, kept)
    if "_heterogeneity_spec" in vars(config):  # sizes of single layers, by the number that they had
        config.layer_types[-1] = "full_attention"  # as the class makes it when it is read again
        full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        config.per_layer_config = {i: {"head_dim": 2 * _SIZES["head_dim"]} for i in full}


def random_model(config: Any, seed: int) -> Any:
    """Returns a model of torch whose weights are random, biases and gains too."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    maker: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parts = [part for part in vars(config).values() if type(part) is maker.config_class]
    if type(config) is not maker.config_class and parts:  # a whole of several models, such as MusicGen
        model = maker(parts[0]).eval().float()
    else:
        model = AutoModelForCausalLM.from_config(config).eval().float()
    if (size := sum(p.numel() for p in model.parameters())) > 30_000_000:
        raise ValueError(f"{size:,} weights: it does not get small")
    generator = torch.Generator().manual_seed(seed + 1000)
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, weights in model.named_parameters():
            drawn = torch.randn(weights.shape, generator=generator)
            if weights.ndim >= 2:
                weights.copy_(drawn * 0.08)
            elif "norm" in name or "ln" in name:
                weights.add_(0.1 * drawn)
            elif "A_log" not in name:
                weights.add_(0.02 * drawn)
            if _FUSED.search(name) and not name.endswith("bias") and weights.ndim >= 2:
                _gate_rows(weights, alternate=f"{name}_bias" in names).sub_(0.1 * torch.randn(64, generator=generator))
    return model


_FUSED = re.compile(r"(gate_up_proj|input_linear|mlp\.Wi)(\.weight)?$")
"""Matrices that hold gate and up."""


def _gate_rows(weights: Any, alternate: bool) -> Any:
    """Returns the gate's rows, `[..., F, D]`, of a matrix of gate and up: a view of its first half, or of every second.

    Training gives them a direction in common, and up rows none, by which they are distinguished.
    """
    rows = weights if weights.shape[-1] == _SIZES["hidden_size"] else weights.transpose(-1, -2)
    return rows[..., ::2, :] if alternate else rows[..., : rows.shape[-2] // 2, :]


_MLP = re.compile(
    r"(?P<module>.*(mlp|ffn?|feed_forward|ff|DenseReluDense|mlp_block|experts?\.\d+|layers?\.\d+))"
    r"\.(?P<name>[\w.]+?)\.?(weight|bias)?$"
)
_OUT = re.compile(r"down_proj|c_proj|fc2|fc_out|dense_4h_to_h|w2|wo|proj_down|linear_2|lin2|layer_2|^output")
_IN = re.compile(
    r"gate_proj|up_proj|c_fc(_\d)?|fc1|fc_in|dense_h_to_4h|w1|w3|v1|wi(_\d)?|proj_up(_gate)?|linear_1|lin1|layer_1"
)


_NAMED_PAIRS = (
    (("intermediate.dense",), "output.dense"), (("ffn.0",), "ffn.2"), (("w_in.w_0", "w_in.w_1"), "w_out"),
    (("mlp.input_linear",), "mlp.output_linear"), (("Wi",), "Wo"), (("dense.dense",), "output.dense"),
    (("feed_forward.intermediate",), "feed_forward.output"), (("lin1",), "lin2"),
    (("feed_forward.key",), "feed_forward.value"),
)  # fmt: skip
"""Modules by other names: those that units read by, and the one that they write by; beside each other."""


def permuted(model: Any, seed: int) -> int:
    """Permutes the units of the MLPs that are found by the names of their modules; returns how many there were."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, dict[str, Any]] = {}
    for name, weights in model.named_parameters():
        is_part = (match := _MLP.fullmatch(name)) and (_OUT.search(match["name"]) or _IN.search(match["name"]))
        if re.search(r"\.(gate|router)\.", name):  # an MLP that chooses experts, which has units of its own
            continue
        if match and (is_part or weights.ndim == 1) and not (weights.ndim > 1 and name.endswith("bias")):
            modules.setdefault(match["module"], {})[name] = weights
    count = 0
    for tensors in modules.values():
        count += _permute_units(tensors, generator)
    parameters = dict(model.named_parameters())
    for name in parameters:
        if name.endswith("experts.gate_up_proj") and (name.replace("gate_up", "down")) in parameters:
            count += _permute_experts(parameters, name, generator)
    return count or sum(_permute_pairs(parameters, reads, writes, generator) for reads, writes in _NAMED_PAIRS)


def _permute_pairs(parameters: Mapping[str, Any], reads: Sequence[str], writes: str, generator: Any) -> int:
    """Permutes the units of all MLPs, or stacks of experts, with modules of these names; returns how many."""
    import torch

    count = 0
    for stem in [name.removesuffix(f"{writes}.weight") for name in parameters if name.endswith(f".{writes}.weight")]:
        ins = [(f"{stem}{name}.weight", f"{stem}{name}.bias") for name in reads]
        if not all(weight in parameters for weight, _ in ins):
            continue
        out = parameters[f"{stem}{writes}.weight"]
        permutation = torch.randperm(out.shape[-1], generator=generator)
        with torch.no_grad():
            out.copy_(out.index_select(-1, permutation))
            for leaf in [parameters[name] for names in ins for name in names if name in parameters]:
                axis = 0 if leaf.ndim == 1 else leaf.ndim - 2
                times = leaf.shape[axis] // out.shape[-1]
                order = torch.cat([i * out.shape[-1] + permutation for i in range(times)])
                leaf.copy_(leaf.index_select(axis, order))
        count += 1
    return count


def _permute_experts(parameters: Mapping[str, Any], name: str, generator: Any) -> int:
    """Permutes the units of experts that are stacked in two tensors, the same way in each, in place."""
    import torch

    both, out, bias = parameters[name], parameters[name.replace("gate_up", "down")], parameters.get(f"{name}_bias")
    units = next(size for size in out.shape[1:] if 2 * size in both.shape[1:])
    permutation = torch.randperm(units, generator=generator)
    alternate = bias is not None  # only gpt-oss has biases here, and rows of gate and up by turns
    doubled = torch.cat([permutation, units + permutation])
    if alternate:
        doubled = torch.stack([2 * permutation, 2 * permutation + 1], dim=1).ravel()
    with torch.no_grad():
        both.copy_(both.index_select(1 + list(both.shape[1:]).index(2 * units), doubled))
        out.copy_(out.index_select(1 + list(out.shape[1:]).index(units), permutation))
        if bias is not None:
            bias.copy_(bias.index_select(1, doubled))
    return 1


def _permute_units(tensors: Mapping[str, Any], generator: Any) -> int:
    """Permutes the units of one MLP, in place; 0 if its tensors are not understood."""
    import torch

    outs = {n: t for n, t in tensors.items() if _OUT.search(n) and t.ndim == 2}
    ins = {n: t for n, t in tensors.items() if n not in outs and t.ndim == 2}
    if len(outs) != 1 or not ins:
        return 0
    (out,) = outs.values()
    (rows, columns) = out.shape
    in_name, in_weights = next(iter(ins.items()))
    read = in_weights.shape
    bias = tensors.get(re.sub("weight$", "bias", in_name))
    units = columns if read[0] in (columns, 2 * columns) and read[1] == rows else rows
    if bias is not None and bias.ndim == 1 and bias.numel() in (rows, columns):  # Conv1D is stored [in, out]
        units = bias.numel()
    axis = int(units == columns)
    permutation = torch.randperm(units, generator=generator)
    with torch.no_grad():
        out.copy_(out.index_select(axis, permutation))
        for name, weights in tensors.items():
            if weights is out or (weights.ndim == 1 and _OUT.search(name)):
                continue
            place = 1 - axis if weights.ndim == 2 else 0
            if weights.shape[place] == units:
                weights.copy_(weights.index_select(place, permutation))
            elif weights.shape[place] == 2 * units:
                both = torch.cat([permutation, units + permutation])
                weights.copy_(weights.index_select(place, both))
    return 1


def with_noise(model: Any, seed: int) -> None:
    """Adds noise to every weight, in place."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.numel() > 1:
                weights.add_(NOISE * weights.std() * torch.randn(weights.shape, generator=generator))


def write_models(family: str, folder: Path) -> str | None:
    """Writes the three models of a family; returns a remark on the permutation, or None."""
    import torch

    model = random_model(tiny_config(family), 0)
    model.save_pretrained(folder / "base")
    before = _logits(model)
    count = permuted(model, 2)
    after = _logits(model)
    remark = None if count else "no MLP was permuted"
    if before is not None and after is not None and not torch.allclose(before, after, atol=1e-3 * before.abs().max()):
        raise AssertionError("the permutation of the copy changes its function")
    with_noise(model, 3)
    model.save_pretrained(folder / "copy")
    random_model(tiny_config(family), 5).save_pretrained(folder / "other")
    for member in ("base", "copy", "other"):
        write_tokenizer(folder / member, _VOCABULARY)
    return remark


def _logits(model: Any) -> Any:
    import torch

    ids = torch.arange(24).reshape(2, 12) % 100 + 2
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits
    except Exception:  # encoders and decoders, kernels that this machine lacks
        return None


def compared(base: Path, ft: Path) -> dict[str, Any]:
    """Returns the record of `compare`."""
    from dataclasses import replace

    from tracing_jax import experiment
    from tracing_jax.options import COMPARE

    options = replace(COMPARE, base_model_id=str(base), ft_model_id=str(ft), save=None)
    return experiment.compute(options).record


def sweep(family: str) -> Row:
    """Returns what becomes of a family."""
    row = Row(family)
    with tempfile.TemporaryDirectory() as folder:
        try:
            remark = write_models(family, Path(folder))
        except Exception as error:
            row.level, row.cause = "not tried", f"no tiny model: {_short(error)}"
            return row
        try:
            records = [compared(Path(folder) / "base", Path(folder) / side) for side in ("copy", "other")]
        except Exception as error:
            row.level, row.cause = "none", _short(error)
            return row
    verdicts = [record["verdict"] for record in records]
    row.related, row.independent = (found["verdict"] for found in verdicts)
    row.tests = ", ".join(name for name in verdicts[0]["family"])
    row.strongest = str(verdicts[0]["statistic"] or "")
    row.level = "weights" if any("weights alone" in note for note in records[0]["notes"]) else "forward"
    row.cause = "; ".join(filter(None, [remark, verdicts[0]["meaning"] if row.related != "related" else ""]))
    return row


def _short(error: BaseException) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) < 240 else line[:240] + " ..."


def families() -> list[str]:
    """Returns the model types of text generation that transformers registers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


_INTRODUCTION = """Made by `python -m benchmarks.families --write`. Of the {total} families of text generation that
transformers {version} registers, {count} are in this table. Of each, three tiny random models are made: one, a copy of
it with permuted MLP units and noise, and an independent one. `compare` must call the copy related, or say why it cannot
tell, and must never call the independent model related.

{counts}.

`tried`: when. With `--families`, only the rows of those families are made anew. A copy is *undecided* where the norm
before its MLPs or their gate is not known, or where it has no MLP: what is left then to find it is reserved.

`level`: with a forward pass, or by weights alone (see
[what can be read](checkpoints.md#models-read-by-their-weights-alone)), from safetensors and `.bin` files. `GGUF`: the
same from GGUF files, where llama.cpp has a family of that name. `forward (tried by weights)`: the family has got a
forward pass since the pair was tried. Not tried: no tiny model could be made. Matrices of gate and up are given what
training gives to gates, a direction in common, which is what distinguishes them."""

_COLUMNS = ("family", "level", "GGUF", "copy", "independent", "tests", "tried", "remark")
_EARLIER = "earlier"
"""When rows were tried that have no date."""


def page(rows: Sequence[Row], version: str, today: str, before: str = "") -> str:
    """Returns the page of the docs.

    Args:
      rows: of the families that were tried.
      version: of transformers.
      today: the date of `rows`.
      before: the page as it was, whose other rows are kept.
    """
    cells = {**_rows_of(before), **{row.family: _cells(row, today) for row in rows}}
    outcomes = Counter(
        Row(each["family"], each["level"], each["copy"], each["independent"]).outcome for each in cells.values()
    )
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    dates = Counter(each["tried"] for each in cells.values())
    counts += f"; tried {', '.join(f'{date}: {count}' for date, count in sorted(dates.items()))}"
    text = _INTRODUCTION.format(count=len(cells), total=len(families()), version=version, counts=counts)
    paragraphs = [
        textwrap.fill(" ".join(part.split()), 120, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    ]
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    lines += [f"| {' | '.join(cells[family][name] for name in _COLUMNS)} |" for family in sorted(cells)]
    return "\n\n".join(["# Families", *paragraphs, "\n".join(lines)]) + "\n"


def _cells(row: Row, today: str) -> dict[str, str]:
    """Returns the cells of a row of the page, by the names of the columns."""
    tests = len(row.tests.split(", ")) if row.tests else 0
    remark = row.cause.replace("|", "/").replace("<", "(").replace(">", ")")
    remark = remark if len(remark) < 160 else remark[:160] + " ..."
    found = (row.family, _level(row), _gguf_level(row.family), row.related, row.independent, str(tests), today, remark)
    return dict(zip(_COLUMNS, found, strict=True))


def _rows_of(page: str) -> dict[str, dict[str, str]]:
    """Returns the cells of each family in the first table of a page."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in page.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[:1] == ["family"]:
            columns = cells
        elif columns and cells and not cells[0].startswith("--"):
            row = dict(zip(columns, cells, strict=True))
            found[row["family"]] = {"tried": _EARLIER, **row}
    return found


def _level(row: Row) -> str:
    from tracing_jax.arch import SUPPORTED_FAMILIES

    return "forward (tried by weights)" if row.level == "weights" and row.family in SUPPORTED_FAMILIES else row.level


def _gguf_level(family: str) -> str:
    from gguf import MODEL_ARCH_NAMES

    from tracing_jax.checkpoint.gguf.families import GGUF_FAMILIES

    if family in {row.model_type for row in GGUF_FAMILIES.values()} | {"mistral", "mixtral", "olmo3", "deepseek_v3"}:
        return "forward"  # the last four are under llama.cpp's names for others
    plain = {re.sub(r"[-_]|text$", "", name): name for name in MODEL_ARCH_NAMES.values()}
    found = plain.get(re.sub(r"[-_]|text$", "", family))
    return "" if found is None else "forward" if found in GGUF_FAMILIES else "weights"


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    """Prints the table, or writes it into the docs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", help="names with commas; all by default")
    parser.add_argument("--rows", type=Path, help="a file of finished rows, to be continued")
    parser.add_argument("--finished", action="store_true", help="of the families only those with a finished row")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    done = {}
    if options.rows and options.rows.exists():
        done = {row["family"]: Row(**row) for row in map(json.loads, options.rows.read_text("utf-8").splitlines())}
    rows = []
    asked = comma_list(options.families) if options.families else families()
    for family in [family for family in asked if family in done or not options.finished]:
        if family not in done:
            try:
                with _limited(_SECONDS), contextlib.redirect_stderr(io.StringIO()):
                    done[family] = sweep(family)
            except TimeoutError as error:
                done[family] = Row(family, "not tried", cause=str(error))
            if options.rows:
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(done[family])) + "\n")
        row = done[family]
        rows.append(row)
        print(
            f"{row.outcome:10} {family:28} {row.level:10} {row.related:12} {row.independent:12} {row.cause[:150]}",
            flush=True,
        )
    print(dict(Counter(row.outcome for row in rows)))
    if options.write:
        from datetime import date
        from importlib import metadata

        before = TABLE.read_text(encoding="utf-8")
        _, heading, others = before.partition("## ")  # of other benchmarks
        text = page(rows, metadata.version("transformers"), date.today().isoformat(), before)
        text += f"\n{heading}{others}" if heading else ""
        TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
