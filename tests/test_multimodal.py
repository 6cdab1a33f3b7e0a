"""Multimodal models: the language model inside is read, and computes what transformers computes of a text."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES
from safetensors.numpy import load_file, save_file

from tracing_jax.arch import SUPPORTED_MULTIMODAL, UnsupportedModelError, read_arch
from tracing_jax.checkpoint import open_checkpoint, save_checkpoint
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.forward import logits
from tracing_jax.sources import InMemory, in_memory
from tracing_jax.tree import flatten

TOLERANCE = 2e-4
_TEXT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 777.0}
_SECTIONS = {"head_dim": 12, "rope_parameters": _ROPE | {"mrope_section": [2, 2, 2]}}
_GLM_ROPE = _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24}
_SIGLIP, _CLIP = {"model_type": "siglip_vision_model"} | _VISION, {"model_type": "clip_vision_model"} | _VISION


def _text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type} | _TEXT | {"rope_parameters": _ROPE, "rms_norm_eps": 3e-3} | changes


def _gemma4(model_type: str, **changes: Any) -> dict[str, Any]:
    sliding, full = "sliding_attention", "full_attention"
    return _text(
        model_type, sliding_window=5, layer_types=[sliding, full, full], num_hidden_layers=3, head_dim=8,
        rope_parameters={full: _ROPE, sliding: _ROPE | {"rope_theta": 43.2}}, global_head_dim=12,
        final_logit_softcapping=2.5, **{"pad_token_id": 0} | changes,
    )  # fmt: skip


_GEMMA4_VISION = {"model_type": "gemma4_vision"} | _VISION | {"head_dim": 8, "num_key_value_heads": 2}
_DELTA = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5,
                        "mrope_section": [1, 1, 1]},
    "linear_conv_kernel_dim": 3, "linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _text(
            "gemma3_text", sliding_window=5, layer_types=["sliding_attention", "full_attention"], head_dim=8,
            rope_parameters={"full_attention": _ROPE, "sliding_attention": _ROPE | {"rope_theta": 43.2}},
        ),
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 39,
    },
    "gemma4": {
        "text_config": _gemma4(
            "gemma4_text", hidden_size_per_layer_input=6, vocab_size_per_layer_input=40, num_kv_shared_layers=1,
        ),
        "vision_config": _GEMMA4_VISION, "audio_config": None, "image_token_id": 39,
    },
    "gemma4_unified": {
        "text_config": _gemma4("gemma4_unified_text", attention_k_eq_v=True),
        "vision_config": {"patch_size": 2, "pooling_kernel_size": 1, "mm_embed_dim": 24, "mm_posemb_size": 4,
                          "output_proj_dims": 24},
        "audio_config": None, "image_token_id": 39,
    },
    "llava": {"text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": 39},
    "llava_next": {
        "text_config": _text("mistral", sliding_window=5), "vision_config": _CLIP, "image_token_index": 39,
        "image_grid_pinpoints": [[8, 8]],
    },
    "llava_onevision": {"text_config": _text("qwen2"), "vision_config": _SIGLIP, "image_token_index": 39},
    "llava_next_video": {
        "text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": 39, "video_token_index": 38,
        "image_grid_pinpoints": [[8, 8]],
    },
    "video_llava": {
        "text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": 39, "video_token_index": 38,
    },
    "vipllava": {
        "text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": 39, "vision_feature_layers": [-1],
    },
    "idefics3": {"text_config": _text("llama"), "vision_config": _VISION, "image_token_id": 39, "scale_factor": 2},
    "smolvlm": {"text_config": _text("llama"), "vision_config": _VISION, "image_token_id": 39, "scale_factor": 2},
    "ovis2": {
        "text_config": _text("qwen2"), "image_token_id": 39, "hidden_size": 24,
        "vision_config": _VISION | {"vocab_size": 20, "num_visual_indicator_tokens": 2},
    },
    "got_ocr2": {
        "text_config": _text("qwen2"), "image_token_index": 39,
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
                          "patch_size": 16, "output_channels": 8, "mlp_dim": 16, "global_attn_indexes": [0]},
    },
    "glm4v": {
        "text_config": _text("glm4v_text", hidden_size=32, rope_parameters=_GLM_ROPE),
        "vision_config": _QWEN_VISION | {"out_hidden_size": 32, "intermediate_size": 16, "image_size": 8},
        "image_token_id": 39, "video_token_id": 38, "image_start_token_id": 37, "image_end_token_id": 36,
    },
    "glm4v_moe": {
        "text_config": _text(
            "glm4v_moe_text", hidden_size=32, head_dim=8, rope_parameters=_GLM_ROPE, moe_intermediate_size=12,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        ),
        "vision_config": _QWEN_VISION | {"out_hidden_size": 32, "intermediate_size": 16, "image_size": 8},
        "image_token_id": 39, "video_token_id": 38, "image_start_token_id": 37, "image_end_token_id": 36,
    },
    "mistral3": {
        "text_config": _text("mistral", sliding_window=None, head_dim=8), "image_token_index": 39,
        "vision_config": {"model_type": "pixtral"} | _VISION,
        "tie_word_embeddings": False,
    },
    "internvl": {
        "text_config": _text("qwen2"), "image_token_id": 39, "tie_word_embeddings": False,
        "vision_config": {"model_type": "internvl_vision"} | _VISION | {"image_size": [8, 8], "patch_size": [4, 4]},
    },
    "qwen2_vl": {
        "text_config": _text("qwen2_vl_text", **_SECTIONS | {"head_dim": None}, hidden_size=48),
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 48, "num_heads": 2, "patch_size": 4},
        "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36,
    },
    "qwen2_5_vl": {
        "text_config": _text(
            "qwen2_5_vl_text", hidden_size=48, use_sliding_window=True, sliding_window=4, max_window_layers=1,
            rope_parameters=_SECTIONS["rope_parameters"],
        ),
        "vision_config": _QWEN_VISION | {"out_hidden_size": 48, "intermediate_size": 16, "fullatt_block_indexes": [0]},
        "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36,
        "tie_word_embeddings": True,
    },
    "llama4": {
        "text_config": _text(
            "llama4_text", head_dim=8, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=16,
            interleave_moe_layer_step=2, num_hidden_layers=4, attention_chunk_size=5, floor_scale=3,
        ),
        "vision_config": _VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "kimi_k25": {
        "text_config": _text(
            "kimi_k2", kv_lora_rank=10, q_lora_rank=14, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3,
            num_key_value_heads=4, moe_intermediate_size=12, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=2, first_k_dense_replace=1,
        ),
        "vision_config": {"patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4} | _VISION,
        "tie_word_embeddings": False,
    },
    "qwen3_vl_moe": {
        "text_config": _text(
            "qwen3_vl_moe_text", **_SECTIONS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            norm_topk_prob=False,
        ),
        "vision_config": _QWEN_VISION
        | {"intermediate_size": 16, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
        "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36,
    },
    "qwen3_5": {
        "text_config": _text("qwen3_5_text", **_SECTIONS | _DELTA),
        "vision_config": _QWEN_VISION | {"intermediate_size": 16, "num_position_embeddings": 4},
        "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36,
    },
    "qwen3_5_moe": {
        "text_config": _text(
            "qwen3_5_moe_text", **_SECTIONS | _DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=12,
        ),
        "vision_config": _QWEN_VISION | {"intermediate_size": 16, "num_position_embeddings": 4},
        "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36,
    },
    "qwen3_vl": {
        "text_config": _text("qwen3_vl_text", **_SECTIONS, attention_bias=True),
        "vision_config": _QWEN_VISION
        | {"intermediate_size": 16, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
        "image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36,
    },
}  # fmt: skip


def test_every_type_is_tried():
    assert sorted(_CONFIGS) == sorted(SUPPORTED_MULTIMODAL)


def test_logits_that_the_text_model_scales_are_refused(tmp_path):
    config = {"model_type": "llava", "text_config": CASES["granite-gqa-untied-default"].config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="scaled or capped in a llava model"):
        read_arch(tmp_path)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", _CONFIGS)
def test_text_is_computed_as_transformers_computes_it(model_type, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(model_type, **_CONFIGS[model_type])
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and not name.endswith("bias") and model_type != "gemma3" else 0.0
            parameter.normal_(centre, 0.3)
    model.save_pretrained(tmp_path / "whole")
    if model_type == "kimi_k25":
        _as_published(tmp_path / "whole" / "model.safetensors")
    tokens = np.random.default_rng(0).integers(0, 36, (2, 12))
    with torch.no_grad():
        # That of Llama 4 asks for what only images give, in transformers 5.24.
        whole = model.language_model if model_type == "llama4" else model
        expected = whole(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    found = open_checkpoint(str(tmp_path / "whole"))
    assert any("the language model is read" in note for note in found.notes)
    assert any("parts for other inputs" in note for note in found.notes)
    ours = InMemory(found.arch, jax.tree.map(jnp.asarray, in_memory(found).params))
    error = np.abs(logits(ours, tokens.astype(np.int32)) - expected).max()
    assert error <= TOLERANCE * max(1.0, np.abs(expected).max())
    save_checkpoint(tmp_path / "text", found, companions=tmp_path / "whole")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager", dtype="float32")
    with torch.no_grad():
        again = alone.eval()(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    assert np.abs(again - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


def test_an_adapter_on_the_language_model_inside_is_merged(tmp_path):
    case = CASES["mistral-gqa-untied-default"]
    tensors = {name: case.weight(name, s) for name, s in tensor_shapes(leaf_layouts(case.arch()).values()).items()}
    base, adapter, rng = tmp_path / "base", tmp_path / "adapter", np.random.default_rng(0)
    base.mkdir()
    adapter.mkdir()
    inside = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(inside, base / "model.safetensors")
    wrapper = {"model_type": "mistral3", "text_config": case.config, "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(wrapper))
    a, b = rng.normal(size=(2, 24)).astype(np.float32), rng.normal(size=(40, 2)).astype(np.float32)
    at = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_"
    save_file({f"{at}A.weight": a, f"{at}B.weight": b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = open_checkpoint(str(adapter)).layer(1)["mlp"]["up_proj"]["kernel"]
    expected = tensors["model.layers.1.mlp.up_proj.weight"] + 3 * (b @ a)
    np.testing.assert_allclose(found, expected.T, rtol=0, atol=1e-5)


def _as_published(file: Path) -> None:
    """Renames the layers of Kimi K2.5, which transformers 5.24 writes as blocks, as its vision tower's are called."""
    tensors = load_file(file)
    save_file({name.replace("language_model.model.blocks", "language_model.model.layers"): tensor
               for name, tensor in tensors.items()}, file)  # fmt: skip


@pytest.mark.parametrize("prefixes", [("model.language_model.", ""), ("language_model.model.", "language_model.")])
def test_language_model_is_found_under_the_names_of_both_times(prefixes, tmp_path):
    case, (body, head) = CASES["mistral-gqa-untied-default"], prefixes
    tensors = {name: case.weight(name, s) for name, s in tensor_shapes(leaf_layouts(case.arch()).values()).items()}
    stored = {
        body + name.removeprefix("model.") if name.startswith("model.") else head + name: tensor
        for name, tensor in tensors.items()
    }
    stored |= {"vision_tower.patch_conv.weight": np.ones((2, 2), np.float32)}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mistral3", "text_config": case.config, "tie_word_embeddings": False})
    )
    save_file(stored, tmp_path / "model.safetensors")
    found = open_checkpoint(str(tmp_path))
    assert found.arch == case.arch()
    ours, theirs = (flatten(in_memory(source).params) for source in (found, case.source()))
    assert all(np.array_equal(ours[name], leaf) for name, leaf in theirs.items())
    assert any("parts for other inputs than text: vision_tower.patch_conv.weight" in note for note in found.notes)
    save_checkpoint(tmp_path / "text", found, companions=tmp_path)
    assert read_arch(tmp_path / "text") == case.arch()
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "mistral"
