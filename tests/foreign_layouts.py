"""Small checkpoints in the layouts of models that are read by their weights alone, written without this package.

Letters: D features, F units of an MLP, V vocab, E experts.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

D, F, V, E, LAYERS = 32, 80, 96, 3, 3


class Writer:
    """Draws the tensors of a model; matrices are `[out, in]`."""

    def __init__(self, seed: int):
        self.rng, self.tensors = np.random.default_rng(seed), Tensors()

    def matrix(self, name: str, *shape: int, scale: float = 0.2) -> None:
        """Adds normal weights."""
        self.tensors[name] = (scale * self.rng.normal(size=shape)).astype(np.float32)

    def gain(self, name: str, size: int = D, center: float = 1.0) -> None:
        """Adds gains around their neutral value."""
        self.tensors[name] = (center + 0.1 * self.rng.normal(size=size)).astype(np.float32)


def chatglm(seed: int, trained: bool = True) -> Tensors:
    """Fused gate and up in one tensor, fused queries, keys and values, names of ChatGLM 2."""
    w = Writer(seed)
    w.matrix("transformer.embedding.word_embeddings.weight", V, D)
    for i in range(LAYERS):
        at = f"transformer.encoder.layers.{i}."
        w.gain(at + "input_layernorm.weight")
        w.matrix(at + "self_attention.query_key_value.weight", 2 * D, D)
        w.matrix(at + "self_attention.dense.weight", D, D)
        w.gain(at + "post_attention_layernorm.weight")
        w.matrix(at + "mlp.dense_h_to_4h.weight", 2 * F, D)
        if trained:  # what training gives to gates: a direction in common
            w.tensors[at + "mlp.dense_h_to_4h.weight"][:F] -= 0.2 * w.rng.normal(size=D).astype(np.float32)
        w.matrix(at + "mlp.dense_4h_to_h.weight", D, F)
    w.gain("transformer.encoder.final_layernorm.weight")
    w.matrix("transformer.output_layer.weight", V, D)
    w.tensors["transformer.rotary_pos_emb.inv_freq"] = np.linspace(1, 0.01, 4, dtype=np.float32)
    return w.tensors


def baichuan(seed: int) -> Tensors:
    """Fused queries, keys and values as W_pack, the rest as in Llama."""
    w = Writer(seed)
    w.matrix("model.embed_tokens.weight", V, D)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        w.gain(at + "input_layernorm.weight")
        w.matrix(at + "self_attn.W_pack.weight", 3 * D, D)
        w.matrix(at + "self_attn.o_proj.weight", D, D)
        w.tensors[at + "self_attn.rotary_emb.inv_freq"] = np.linspace(1, 0.01, 4, dtype=np.float32)
        w.gain(at + "post_attention_layernorm.weight")
        for name in ("gate_proj", "up_proj"):
            w.matrix(at + f"mlp.{name}.weight", F, D)
        w.matrix(at + "mlp.down_proj.weight", D, F)
    w.gain("model.norm.weight")
    w.matrix("lm_head.weight", V, D)
    return w.tensors


def internlm2(seed: int) -> Tensors:
    """Names of InternLM 2: w1 is the gate, w3 is up, w2 is down."""
    w = Writer(seed)
    w.matrix("model.tok_embeddings.weight", V, D)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        w.gain(at + "attention_norm.weight")
        w.matrix(at + "attention.wqkv.weight", 2 * D, D)
        w.matrix(at + "attention.wo.weight", D, D)
        w.gain(at + "ffn_norm.weight")
        w.matrix(at + "feed_forward.w1.weight", F, D)
        w.matrix(at + "feed_forward.w3.weight", F, D)
        w.matrix(at + "feed_forward.w2.weight", D, F)
    w.gain("model.norm.weight")
    w.matrix("output.weight", V, D)
    return w.tensors


def mpt(seed: int) -> Tensors:
    """An MLP without a gate, norms without biases, ALiBi, a tied head; names of MPT."""
    w = Writer(seed)
    w.matrix("transformer.wte.weight", V, D)
    for i in range(LAYERS):
        at = f"transformer.blocks.{i}."
        w.gain(at + "norm_1.weight")
        w.matrix(at + "attn.Wqkv.weight", 3 * D, D)
        w.matrix(at + "attn.out_proj.weight", D, D)
        w.gain(at + "norm_2.weight")
        w.matrix(at + "ffn.up_proj.weight", F, D)
        w.matrix(at + "ffn.down_proj.weight", D, F)
    w.gain("transformer.norm_f.weight")
    return w.tensors


def mamba(seed: int) -> Tensors:
    """No MLP at all: state-space mixers, whose A_log starts alike in all models."""
    w, inner = Writer(seed), 2 * D
    w.matrix("backbone.embeddings.weight", V, D)
    for i in range(LAYERS):
        at = f"backbone.layers.{i}."
        w.gain(at + "norm.weight")
        w.tensors[at + "mixer.A_log"] = np.log(np.tile(np.arange(1, 9, dtype=np.float32), (inner, 1)))
        w.tensors[at + "mixer.D"] = np.ones(inner, np.float32)
        w.matrix(at + "mixer.conv1d.weight", inner, 1, 4)
        w.matrix(at + "mixer.in_proj.weight", 2 * inner, D)
        w.matrix(at + "mixer.x_proj.weight", 20, inner)
        w.matrix(at + "mixer.dt_proj.weight", inner, 4)
        w.matrix(at + "mixer.out_proj.weight", D, inner)
    w.gain("backbone.norm_f.weight")
    return w.tensors


def experts(seed: int) -> Tensors:
    """A first dense layer, then a shared expert and experts of their own tensors; names of DeepSeek's code."""
    w = Writer(seed)
    w.matrix("model.embed_tokens.weight", V, D)
    for i in range(LAYERS + 1):
        at = f"model.layers.{i}."
        w.gain(at + "input_layernorm.weight")
        w.matrix(at + "self_attn.q_proj.weight", 2 * D, D)
        w.matrix(at + "self_attn.kv_a_proj_with_mqa.weight", 24, D)
        w.gain(at + "self_attn.kv_a_layernorm.weight", 16)
        w.matrix(at + "self_attn.o_proj.weight", D, 2 * D)
        w.gain(at + "post_attention_layernorm.weight")
        mlps = {"mlp.": 2 * F} if i == 0 else {"mlp.shared_experts.": F} | {f"mlp.experts.{e}.": 40 for e in range(E)}
        for mlp, units in mlps.items():
            w.matrix(at + mlp + "gate_proj.weight", units, D)
            w.matrix(at + mlp + "up_proj.weight", units, D)
            w.matrix(at + mlp + "down_proj.weight", D, units)
        if i:
            w.matrix(at + "mlp.gate.weight", E, D)
    w.gain("model.norm.weight")
    w.matrix("lm_head.weight", V, D)
    return w.tensors


def vision_tower(seed: int) -> Tensors:
    """A vision tower with norms with biases, an MLP without a gate and learned positions; names of LLaVA's."""
    w = Writer(seed)
    start = "vision_tower.vision_model."
    w.matrix(start + "embeddings.patch_embedding.weight", D, 3, 4, 4)
    w.matrix(start + "embeddings.position_embedding.weight", 20, D)
    for i in range(LAYERS):
        at = f"{start}encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            w.gain(at + norm + ".weight")
            w.gain(at + norm + ".bias", center=0.0)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            w.matrix(at + f"self_attn.{name}.weight", D, D)
        w.matrix(at + "mlp.fc1.weight", F, D)
        w.gain(at + "mlp.fc1.bias", F, 0.0)
        w.matrix(at + "mlp.fc2.weight", D, F)
        w.gain(at + "mlp.fc2.bias", center=0.0)
    for kind, center in (("weight", 1.0), ("bias", 0.0)):
        w.gain(f"{start}post_layernorm.{kind}", center=center)
    w.matrix("multi_modal_projector.linear_1.weight", D, D)
    return w.tensors


def stitched(seed: int, vision_seed: int = 0) -> Tensors:
    """A language model and a vision tower, each of a seed of its own."""
    inner = {f"language_model.{name}": tensor for name, tensor in baichuan(seed).items()}
    return inner | vision_tower(vision_seed)


CONFIGS: Mapping[Callable[[int], Tensors], dict[str, object]] = {
    chatglm: {"model_type": "chatglm", "hidden_size": D, "rmsnorm": True, "padded_vocab_size": V,
              "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMModel"}},
    baichuan: {"model_type": "baichuan", "hidden_size": D, "rms_norm_eps": 1e-6, "vocab_size": V},
    internlm2: {"model_type": "internlm2", "hidden_size": D, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": V},
    mpt: {"model_type": "mpt_of_own", "d_model": D, "no_bias": True, "attn_config": {"alibi": True}, "vocab_size": V},
    stitched: {"model_type": "llava_of_its_own", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "vocab_size": V,
               "vision_config": {"hidden_size": D}},
    mamba: {"model_type": "mamba", "hidden_size": D, "layer_norm_epsilon": 1e-5, "vocab_size": V},
    experts: {"model_type": "deepseek_v9", "hidden_size": D, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "vocab_size": V},
}  # fmt: skip
"""Layout -> the content of its config.json."""


def write(folder: Path, layout: Callable[[int], Tensors], tensors: Tensors) -> str:
    """Writes a checkpoint and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[layout]))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def write_gguf(path: Path, tensors: Tensors, architecture: str, epsilon: float = 1e-6) -> str:
    """Writes tensors as a GGUF file of a family that has RMS norms and rotary positions; returns its path."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(D)
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_rope_freq_base(1e4)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def llama_cpp(seed: int) -> Tensors:
    """A dense model and, from its second layer on, stacked experts, with the names of llama.cpp."""
    w = Writer(seed)
    w.matrix("token_embd.weight", V, D)
    for i in range(LAYERS):
        at = f"blk.{i}."
        w.gain(at + "attn_norm.weight")
        w.matrix(at + "attn_qkv.weight", 2 * D, D)
        w.matrix(at + "attn_output.weight", D, D)
        w.gain(at + "ffn_norm.weight")
        w.matrix(at + "ffn_gate_inp.weight", E, D)
        w.matrix(at + "ffn_gate_exps.weight", E, F, D)
        w.matrix(at + "ffn_up_exps.weight", E, F, D)
        w.matrix(at + "ffn_down_exps.weight", E, D, F)
    w.gain("output_norm.weight")
    w.matrix("output.weight", V, D)
    return w.tensors


def noisy_copy(tensors: Tensors, seed: int = 9) -> Tensors:
    """Returns the tensors with noise of a tenth of their standard deviation; constants stay as they are."""
    rng = np.random.default_rng(seed)
    return {
        name: tensor if name.endswith(("A_log", ".D", "inv_freq"))
        else (tensor + 0.1 * tensor.std() * rng.normal(size=tensor.shape)).astype(np.float32)
        for name, tensor in tensors.items()
    }  # fmt: skip


def permuted(tensors: Tensors, names: Mapping[str, tuple[int, int]], seed: int = 4) -> Tensors:
    """Returns the tensors with the units of each layer in another order.

    Args:
      tensors: of a model.
      names: part of a name of a tensor -> the axis of its units, and how many matrices it holds one after another.
      seed: of the order.
    """
    found, orders = dict(tensors), dict[str, np.ndarray]()
    rng = np.random.default_rng(seed)
    for name, tensor in tensors.items():
        for part, (axis, count) in names.items():
            if part in name:
                units = tensor.shape[axis] // count
                order = orders.setdefault(name.partition(part)[0], rng.permutation(units))
                found[name] = np.take(tensor, np.concatenate([order + k * units for k in range(count)]), axis)
    return found
