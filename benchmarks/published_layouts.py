"""Tensors of published models that transformers cannot build here: their names and shapes, for tiny checkpoints.

The code of most is not part of transformers; the towers of Gemma 3n need another package.

The names are those of the published checkpoints, as the code of their repositories and of llama.cpp, vLLM and SGLang
reads them. Nothing of that code is run: a checkpoint that is read by its weights alone needs names and shapes only.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_LLAMA = """
    {i}.input_layernorm.weight D
    {i}.self_attn.q_proj.weight A D
    {i}.self_attn.k_proj.weight K D
    {i}.self_attn.v_proj.weight K D
    {i}.self_attn.o_proj.weight D A
    {i}.post_attention_layernorm.weight D
"""
_MLP = """
    {i}.mlp.gate_proj.weight F D = gate
    {i}.mlp.up_proj.weight F D = up
    {i}.mlp.down_proj.weight D F = down
"""
_ENDS = """
    model.embed_tokens.weight V D = embedding
    model.norm.weight D
    lm_head.weight V D = head
"""
_LAYERS = "model.layers.{i}"


def _under(prefix: str, text: str) -> str:
    return text.replace("{i}.", f"{prefix}.")


LAYOUTS: Mapping[str, str] = {
    "xverse": _under(_LAYERS, _LLAMA + _MLP) + _ENDS,
    "baichuan": _under(_LAYERS, re.sub(r".*[qkv]_proj.*\n", "", _LLAMA) + _MLP) + _ENDS + """
        model.layers.{i}.self_attn.W_pack.weight 3D D
    """,
    "deepseek": _under(_LAYERS, _LLAMA) + _ENDS + """
        model.layers.0.mlp.gate_proj.weight F D
        model.layers.0.mlp.up_proj.weight F D
        model.layers.0.mlp.down_proj.weight D F
        model.layers.{+i}.mlp.gate.weight E D
        model.layers.{+i}.mlp.experts.{e}.gate_proj.weight M D
        model.layers.{+i}.mlp.experts.{e}.up_proj.weight M D
        model.layers.{+i}.mlp.experts.{e}.down_proj.weight D M
        model.layers.{+i}.mlp.shared_experts.gate_proj.weight S D = gate
        model.layers.{+i}.mlp.shared_experts.up_proj.weight S D = up
        model.layers.{+i}.mlp.shared_experts.down_proj.weight D S = down
    """,
    "step3p7": _under(_LAYERS, _LLAMA) + _ENDS + """
        model.layers.{i}.self_attn.g_proj.weight N D
        model.layers.{i}.self_attn.q_norm.weight H
        model.layers.{i}.self_attn.k_norm.weight H
        model.layers.0.mlp.gate_proj.weight F D
        model.layers.0.mlp.up_proj.weight F D
        model.layers.0.mlp.down_proj.weight D F
        model.layers.{+i}.moe.gate.weight E D
        model.layers.{+i}.moe.router_bias E
        model.layers.{+i}.moe.gate_proj.weight E M D
        model.layers.{+i}.moe.up_proj.weight E M D
        model.layers.{+i}.moe.down_proj.weight E D M
        model.layers.{+i}.share_expert.gate_proj.weight S D = gate
        model.layers.{+i}.share_expert.up_proj.weight S D = up
        model.layers.{+i}.share_expert.down_proj.weight D S = down
    """,
    "kimi_k3": _under("language_model." + _LAYERS, _LLAMA) + """
        language_model.model.layers.{i}.self_attn.g_proj.weight A D
        language_model.model.layers.{i}.self_attn.A_log N
        language_model.model.layers.{i}.self_attn.dt_bias A
        language_model.model.layers.{i}.self_attn.q_conv1d.weight A 1 4
        language_model.model.layers.{i}.self_attn.b_proj.weight N D
        language_model.model.layers.{i}.self_attn.o_norm.weight H
        language_model.model.layers.0.mlp.gate_proj.weight F D
        language_model.model.layers.0.mlp.up_proj.weight F D
        language_model.model.layers.0.mlp.down_proj.weight D F
        language_model.model.layers.{+i}.block_sparse_moe.gate.weight E D
        language_model.model.layers.{+i}.block_sparse_moe.gate.e_score_correction_bias E
        language_model.model.layers.{+i}.block_sparse_moe.experts.{e}.w1.weight M R
        language_model.model.layers.{+i}.block_sparse_moe.experts.{e}.w2.weight R M
        language_model.model.layers.{+i}.block_sparse_moe.experts.{e}.w3.weight M R
        language_model.model.layers.{+i}.block_sparse_moe.routed_expert_down_proj.weight R D
        language_model.model.layers.{+i}.block_sparse_moe.routed_expert_norm.weight R
        language_model.model.layers.{+i}.block_sparse_moe.routed_expert_up_proj.weight D R
        language_model.model.layers.{+i}.block_sparse_moe.shared_experts.gate_proj.weight S D = gate
        language_model.model.layers.{+i}.block_sparse_moe.shared_experts.up_proj.weight S D = up
        language_model.model.layers.{+i}.block_sparse_moe.shared_experts.down_proj.weight D S = down
        language_model.model.embed_tokens.weight V D = embedding
        language_model.model.norm.weight D
        language_model.lm_head.weight V D = head
    """,
    "gemma3n": _under("model.language_model.layers.{i}", _LLAMA + _MLP) + """
        model.language_model.layers.{i}.self_attn.q_norm.weight H
        model.language_model.layers.{i}.pre_feedforward_layernorm.weight D
        model.language_model.layers.{i}.post_feedforward_layernorm.weight D
        model.language_model.layers.{i}.altup.correct_output_scale D
        model.language_model.layers.{i}.altup.modality_router.weight 4 D
        model.language_model.layers.{i}.altup.router_norm.weight D
        model.language_model.layers.{i}.laurel.linear_left.weight 16 D
        model.language_model.layers.{i}.laurel.linear_right.weight D 16
        model.language_model.layers.{i}.laurel.post_laurel_norm.weight D
        model.language_model.layers.{i}.per_layer_input_gate.weight 32 D
        model.language_model.layers.{i}.per_layer_projection.weight D 32
        model.language_model.layers.{i}.post_per_layer_input_norm.weight D
        model.language_model.altup_projections.{e}.weight D D
        model.language_model.altup_unembed_projections.{e}.weight D D
        model.language_model.embed_tokens.weight V D = embedding
        model.language_model.embed_tokens_per_layer.weight V 192
        model.language_model.per_layer_model_projection.weight 192 D
        model.language_model.norm.weight D
        model.vision_tower.timm_model.blocks.{i}.0.conv_pw.weight 128 80 1 1
        model.audio_tower.conformer.{i}.ffw_layer_start.ffw_layer_1.weight 512 128
        model.audio_tower.conformer.{i}.ffw_layer_start.ffw_layer_2.weight 128 512
        model.embed_vision.embedding.weight 128 80
        model.embed_vision.embedding_projection.weight D 80
        model.embed_audio.embedding.weight 128 80
    """,
    "internlm2": """
        model.tok_embeddings.weight V D = embedding
        model.layers.{i}.attention_norm.weight D
        model.layers.{i}.attention.wqkv.weight A+2K D
        model.layers.{i}.attention.wo.weight D A
        model.layers.{i}.ffn_norm.weight D
        model.layers.{i}.feed_forward.w1.weight F D = gate
        model.layers.{i}.feed_forward.w3.weight F D = up
        model.layers.{i}.feed_forward.w2.weight D F = down
        model.norm.weight D
        output.weight V D = head
    """,
    "chatglm": """
        transformer.embedding.word_embeddings.weight V D = embedding
        transformer.encoder.layers.{i}.input_layernorm.weight D
        transformer.encoder.layers.{i}.self_attention.query_key_value.weight A+2K D
        transformer.encoder.layers.{i}.self_attention.query_key_value.bias A+2K
        transformer.encoder.layers.{i}.self_attention.dense.weight D A
        transformer.encoder.layers.{i}.post_attention_layernorm.weight D
        transformer.encoder.layers.{i}.mlp.dense_h_to_4h.weight 2F D = first gate, second up
        transformer.encoder.layers.{i}.mlp.dense_4h_to_h.weight D F = down
        transformer.encoder.final_layernorm.weight D
        transformer.output_layer.weight V D = head
        transformer.rotary_pos_emb.inv_freq H
    """,
    "qwen": """
        transformer.wte.weight V D = embedding
        transformer.h.{i}.ln_1.weight D
        transformer.h.{i}.attn.c_attn.weight 3D D
        transformer.h.{i}.attn.c_attn.bias 3D
        transformer.h.{i}.attn.c_proj.weight D D
        transformer.h.{i}.ln_2.weight D
        transformer.h.{i}.mlp.w1.weight F D = up
        transformer.h.{i}.mlp.w2.weight F D = gate
        transformer.h.{i}.mlp.c_proj.weight D F = down
        transformer.ln_f.weight D
        lm_head.weight V D = head
    """,
    "phi3small": """
        model.embed_tokens.weight V D = embedding
        model.layers.{i}.input_layernorm.weight D
        model.layers.{i}.input_layernorm.bias D
        model.layers.{i}.self_attn.query_key_value.weight A+2K D
        model.layers.{i}.self_attn.query_key_value.bias A+2K
        model.layers.{i}.self_attn.dense.weight D A
        model.layers.{i}.self_attn.dense.bias D
        model.layers.{i}.post_attention_layernorm.weight D
        model.layers.{i}.post_attention_layernorm.bias D
        model.layers.{i}.mlp.up_proj.weight 2F D = even gate, odd up
        model.layers.{i}.mlp.up_proj.bias 2F
        model.layers.{i}.mlp.down_proj.weight D F = down
        model.layers.{i}.mlp.down_proj.bias D
        model.final_layernorm.weight D
        model.final_layernorm.bias D
    """,
    "phi-msft": """
        transformer.embd.wte.weight V D = embedding
        transformer.h.{i}.ln.weight D
        transformer.h.{i}.ln.bias D
        transformer.h.{i}.mixer.Wqkv.weight 3D D
        transformer.h.{i}.mixer.Wqkv.bias 3D
        transformer.h.{i}.mixer.out_proj.weight D D
        transformer.h.{i}.mixer.out_proj.bias D
        transformer.h.{i}.mlp.fc1.weight 4D D = up
        transformer.h.{i}.mlp.fc1.bias 4D
        transformer.h.{i}.mlp.fc2.weight D 4D = down
        transformer.h.{i}.mlp.fc2.bias D
        lm_head.ln.weight D
        lm_head.ln.bias D
        lm_head.linear.weight V D = head
        lm_head.linear.bias V
    """,
    "rwkv5": """
        rwkv.embeddings.weight V D = embedding
        rwkv.blocks.0.pre_ln.weight D
        rwkv.blocks.0.pre_ln.bias D
        rwkv.blocks.{i}.ln1.weight D
        rwkv.blocks.{i}.ln1.bias D
        rwkv.blocks.{i}.ln2.weight D
        rwkv.blocks.{i}.ln2.bias D
        rwkv.blocks.{i}.attention.time_decay 4 16
        rwkv.blocks.{i}.attention.time_faaaa 4 16
        rwkv.blocks.{i}.attention.time_mix_key 1 1 D
        rwkv.blocks.{i}.attention.key.weight D D
        rwkv.blocks.{i}.attention.value.weight D D
        rwkv.blocks.{i}.attention.receptance.weight D D
        rwkv.blocks.{i}.attention.gate.weight D D
        rwkv.blocks.{i}.attention.output.weight D D
        rwkv.blocks.{i}.attention.ln_x.weight D
        rwkv.blocks.{i}.attention.ln_x.bias D
        rwkv.blocks.{i}.feed_forward.time_mix_key 1 1 D
        rwkv.blocks.{i}.feed_forward.key.weight F D = up
        rwkv.blocks.{i}.feed_forward.receptance.weight D D
        rwkv.blocks.{i}.feed_forward.value.weight D F = down
        rwkv.ln_out.weight D
        rwkv.ln_out.bias D
        head.weight V D = head
    """,
    "flux": """
        x_embedder.weight D 16
        x_embedder.bias D
        context_embedder.weight D 32
        context_embedder.bias D
        transformer_blocks.{i}.norm1.linear.weight 6D D
        transformer_blocks.{i}.attn.to_q.weight D D
        transformer_blocks.{i}.attn.to_k.weight D D
        transformer_blocks.{i}.attn.to_v.weight D D
        transformer_blocks.{i}.attn.to_out.0.weight D D
        transformer_blocks.{i}.attn.norm_q.weight H
        transformer_blocks.{i}.ff.net.0.proj.weight 4D D = up
        transformer_blocks.{i}.ff.net.0.proj.bias 4D
        transformer_blocks.{i}.ff.net.2.weight D 4D = down
        transformer_blocks.{i}.ff.net.2.bias D
        proj_out.weight 16 D
    """,
    "wan": """
        patch_embedding.weight D 36 1 2 2
        text_embedding.0.weight D 32
        blocks.{i}.modulation 1 6 D
        blocks.{i}.self_attn.q.weight D D
        blocks.{i}.self_attn.k.weight D D
        blocks.{i}.self_attn.v.weight D D
        blocks.{i}.self_attn.o.weight D D
        blocks.{i}.self_attn.norm_q.weight D
        blocks.{i}.cross_attn.q.weight D D
        blocks.{i}.cross_attn.o.weight D D
        blocks.{i}.norm3.weight D
        blocks.{i}.norm3.bias D
        blocks.{i}.ffn.0.weight F D = up
        blocks.{i}.ffn.0.bias F
        blocks.{i}.ffn.2.weight D F = down
        blocks.{i}.ffn.2.bias D
        head.head.weight 64 D = head
        head.head.bias 64
    """,
}  # fmt: skip
"""Model type -> a tensor in each line: its name, its shape, and which part of a model it is, if it
is one of those that tests compare: `first gate, second up` of a tensor that holds two.

`{i}` stands for the number of a layer, `{+i}` for that of a layer after the first, `{e}` for that of an expert. The
letters of shapes are those of `_sizes`.
"""


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Returns the sizes of a tiny model with this config, by their letters.

    D features, F units of an MLP, M of an expert, S of shared experts, E experts, R features of experts, N heads,
    H features of a head, A of all heads, K of all heads of keys, V vocab.
    """
    inner = config.get("text_config") or config

    def first(*names: str, usual: int) -> int:
        return next((inner[name] for name in names if isinstance(inner.get(name), int)), usual)

    heads, head = first("num_attention_heads", "n_head", "num_heads", usual=4), 16
    kv_heads = first("multi_query_group_num", "num_key_value_heads", usual=heads)
    units = first("intermediate_size", "ff_intermediate_size", "ffn_hidden_size", "ffn_dim", usual=96)
    expert = first("moe_intermediate_size", usual=48)
    return {
        "D": 64, "F": units // 2 if config.get("model_type") == "qwen" else units, "M": expert, "S": expert, "E": 4,
        "R": 32, "N": heads, "H": head, "A": heads * head, "K": min(kv_heads, heads) * head, "V": 320,
    }  # fmt: skip


_HALVES = {"": "", "first": " (first half)", "second": " (second half)", "even": " (even rows)", "odd": " (odd rows)"}


def _size(text: str, sizes: Mapping[str, int]) -> int:
    terms = [re.fullmatch(r"(\d*)([A-Z]?)", term) for term in text.split("+")]
    return sum(int(term[1] or 1) * sizes.get(term[2], 1) for term in terms if term)


def tensors(config: Mapping[str, Any], layers: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns random tensors of a tiny model, float32, and name of a part -> the name of its tensor.

    Args:
      config: of the model type of one of `LAYOUTS`.
      layers: number of layers.
      seed: of the weights.
    """
    rng, sizes = np.random.default_rng(seed), _sizes(config)
    found, parts = dict[str, np.ndarray](), dict[str, str]()
    text = LAYOUTS[str(config["model_type"])]
    if "Reward" in str(config.get("architectures")):
        text = re.sub(r"\S+ V D = head", "v_head.weight 1 D", text)
    for line in filter(None, map(str.strip, text.splitlines())):
        what, _, part = line.partition(" = ")
        name, *shape = what.split()
        where = name.replace("{i}", "{layer}").replace("{+i}", "{layer}").replace("{e}", "{expert}")
        where = re.sub(r"^(model\.)?language_model\.", r"\1", where)  # it is left out of names when they are read
        for each in filter(None, part.split(", ")):
            half, _, kind = each.rpartition(" ")
            parts[kind] = where + _HALVES[half]
        for number in range(int("{+i}" in name), layers if "i}" in name else 1):
            for expert in range(sizes["E"] if "{e}" in name else 1):
                full = name.replace("{i}", str(number)).replace("{+i}", str(number)).replace("{e}", str(expert))
                found[full] = _weights(name, rng.normal(size=[_size(size, sizes) for size in shape]))
                if " gate, " in part:  # what training gives to gates, and not to up rows: a direction in common
                    rows = found[full][::2] if part.startswith("even") else found[full][: len(found[full]) // 2]
                    rows -= 0.15 * rng.normal(size=sizes["D"]).astype(np.float32)
    return found, parts


def _weights(name: str, drawn: np.ndarray) -> np.ndarray:
    """Returns weights of a usual scale: gains are near 1."""
    if drawn.ndim == 1:
        is_gain = name.endswith("weight")
        return (1.0 * is_gain + 0.1 * drawn).astype(np.float32)
    return (0.15 * drawn).astype(np.float32)
