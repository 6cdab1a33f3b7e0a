"""A merged adapter gives W + scaling * B A, as PEFT merges it, and anything else than plain LoRA is refused."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_zip_writer import write_arrays

from tracing_jax.checkpoint.adapter import base_id, is_adapter, merged
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.tensors import TensorStore, open_tensors

Q, WTE, NORM, HEAD = "model.layers.0.q_proj.weight", "model.wte.weight", "model.norm.weight", "lm_head.weight"
PREFIX = "base_model.model."
INDICES = [(), (slice(1, 3),), (slice(None), slice(2, 4)), (slice(2, 5), slice(1, 2)), (slice(0, 0),)]
RNG = np.random.default_rng(0)
BASE = {
    Q: RNG.normal(size=(6, 4)).astype(np.float32),
    "model.layers.1.q_proj.weight": RNG.normal(size=(6, 4)).astype(np.float32),
    WTE: RNG.normal(size=(9, 4)).astype(np.float32),
    NORM: RNG.normal(size=4).astype(np.float32),
    HEAD: RNG.normal(size=(9, 4)).astype(ml_dtypes.bfloat16),
}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 3,
    "bias": "none",
    "target_modules": ["q_proj"],
    "modules_to_save": ["lm_head"],
    "init_lora_weights": True,
    "use_dora": False,
    "layer_replication": None,
    "some_later_setting": {},
}


def factors(out, in_, rank=2):
    return RNG.normal(size=(rank, in_)).astype(np.float32), RNG.normal(size=(out, rank)).astype(np.float32)


def adapter(folder, tensors, kind="safetensors", **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    named = {PREFIX + name: value for name, value in tensors.items()}
    if kind == "safetensors":
        save_file(
            {name: np.ascontiguousarray(value) for name, value in named.items()}, folder / "adapter_model.safetensors"
        )
    else:
        write_arrays(folder / "adapter_model.bin", named)
    return folder


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(BASE, tmp_path / "base" / "model.safetensors")
    return open_tensors(tmp_path / "base")


def expect(store, name, wanted, rtol=1e-6):
    """Every slice of `name` is that of the float64 array `wanted`, in the base's dtype."""
    assert (store.shape(name), store.dtype(name)) == (BASE[name].shape, BASE[name].dtype)
    for index in INDICES if wanted.ndim == 2 else [()]:
        actual = store.read(name, index)
        assert actual.dtype == BASE[name].dtype
        np.testing.assert_allclose(actual.astype(np.float64), wanted[index], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("spelling", ["lora_{}.weight", "lora_{}.default.weight"])
def test_update_is_scaled_product_and_the_rest_is_the_base(tmp_path, base, kind, spelling):
    a, b = factors(6, 4)
    names = [f"model.layers.0.q_proj.{spelling.format(side)}" for side in "AB"]
    store = merged(base, adapter(tmp_path / "lora", dict(zip(names, (a, b))), kind))
    assert isinstance(store, TensorStore)
    assert store.names() == base.names()
    config = tmp_path / "lora" / "adapter_config.json"
    assert len(store.files()) == 3
    assert config in store.files()  # its scaling decides the weights, so caches and hashes must see it
    expect(store, Q, BASE[Q].astype(float) + 3 / 2 * b.astype(float) @ a.astype(float))
    for name in (HEAD, WTE, NORM):
        np.testing.assert_array_equal(store.read(name), BASE[name])


def test_sum_is_rounded_once_to_the_dtype_of_the_base(tmp_path, base):
    a, b = factors(9, 4)
    store = merged(base, adapter(tmp_path / "lora", {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}))
    exact = BASE[HEAD].astype(float) + 3 / 2 * b.astype(float) @ a.astype(float)
    np.testing.assert_array_equal(store.read(HEAD), exact.astype(np.float32).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("config", "rank", "scaling"),
    [
        ({}, 2, 3 / 2),
        ({"use_rslora": True}, 2, 3 / math.sqrt(2)),
        ({"rank_pattern": {"q_proj": 1}}, 1, 3),
        ({"rank_pattern": {"layers.0.q_proj": 1}, "alpha_pattern": {r"model\.layers\.\d.q_proj": 5}}, 1, 5),
        ({"rank_pattern": {"proj": 1, "layers.1.q_proj": 1}, "alpha_pattern": {"^layers.*": 7}}, 2, 3 / 2),
        ({"alpha_pattern": {"q_proj": 8, "layers.0.q_proj": 9}, "use_rslora": True}, 2, 8 / math.sqrt(2)),
    ],
)
def test_rank_and_scaling_follow_the_config(tmp_path, base, config, rank, scaling):
    a, b = factors(6, 4, rank)
    path = "model.layers.0.q_proj"
    store = merged(base, adapter(tmp_path / "l", {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, **config))
    expect(store, Q, BASE[Q] + scaling * b.astype(float) @ a)


def test_transposed_weights(tmp_path, base):
    a, b = factors(4, 6)
    path = "model.layers.0.q_proj"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    store = merged(base, adapter(tmp_path / "fan", tensors, fan_in_fan_out=True))
    expect(store, Q, BASE[Q] + 1.5 * (b.astype(float) @ a).T)
    a, b = factors(4, 9)
    store = merged(base, adapter(tmp_path / "emb", {"model.wte.lora_embedding_A": a, "model.wte.lora_embedding_B": b}))
    expect(store, WTE, BASE[WTE] + 1.5 * (b.astype(float) @ a).T)


@pytest.mark.parametrize(
    ("init", "transposed"), [("pissa", False), ("pissa", True), ("olora", False), ("OLoRA", False)]
)
def test_first_factors_are_subtracted_where_the_base_was_changed_by_a_rule(tmp_path, base, init, transposed):
    a, b = factors(4, 6) if transposed else factors(6, 4)
    path = "model.layers.0.q_proj"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    config = {"init_lora_weights": init, "fan_in_fan_out": transposed}
    weight = (BASE[Q].T if transposed else BASE[Q]).astype(float)
    if init == "pissa":
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        first = u[:, :2] * s[:2] @ v[:2]
    else:
        q, r = np.linalg.qr(weight)
        first = 1.5 * q[:, :2] @ r[:2]
    wanted = weight - first + 1.5 * b.astype(float) @ a
    expect(merged(base, adapter(tmp_path / "l", tensors, **config)), Q, wanted.T if transposed else wanted, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_that_is_not_finite_has_no_singular_values(tmp_path, value):
    (tmp_path / "base").mkdir()
    broken = BASE[Q].copy()
    broken[1, 2] = value
    save_file(BASE | {Q: broken}, tmp_path / "base" / "model.safetensors")
    a, b = factors(6, 4)
    path = "model.layers.0.q_proj"
    tensors = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    store = merged(open_tensors(tmp_path / "base"), adapter(tmp_path / "l", tensors, init_lora_weights="pissa"))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*not finite"):
        store.read(Q)


@pytest.mark.parametrize("spelling", ["{}.weight", "{}.modules_to_save.weight", "{}.modules_to_save.default.weight"])
def test_saved_modules_replace_those_of_the_base(tmp_path, base, spelling):
    head, norm = np.ones((9, 4), np.float32), np.full(4, 2, np.float32)
    tensors = {spelling.format("lm_head"): head, spelling.format("model.norm"): norm}
    store = merged(base, adapter(tmp_path / "l", tensors))
    expect(store, HEAD, head.astype(float))
    expect(store, NORM, norm.astype(float))


def test_a_saved_embedding_may_carry_factors_too(tmp_path, base):
    a, b = factors(4, 9)
    whole = np.ones((9, 4), np.float32)
    tensors = {"lora_embedding_A": a, "lora_embedding_B": b, "base_layer.weight": whole}
    store = merged(base, adapter(tmp_path / "l", {f"model.wte.{name}": value for name, value in tensors.items()}))
    expect(store, WTE, 1 + 1.5 * (b.astype(float) @ a).T)


def test_slices_read_only_the_factors_they_need(tmp_path, base, monkeypatch):
    a, b = factors(6, 4)
    path = "model.layers.0.q_proj"
    store = merged(base, adapter(tmp_path / "l", {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}))
    asked = {}
    read = type(base).read
    monkeypatch.setattr(
        type(base), "read", lambda self, name, index=(): asked.setdefault(name, index) and read(self, name, index)
    )
    store.read(Q, (slice(1, 2), slice(2, 3)))
    assert asked == {
        Q: (slice(1, 2), slice(2, 3)),
        f"{PREFIX}{path}.lora_A.weight": (slice(None), slice(2, 3)),
        f"{PREFIX}{path}.lora_B.weight": (slice(1, 2),),
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', only 'LORA'"),
        ({"use_dora": True}, "a magnitude vector belongs to DoRA"),
        ({"use_qalora": True}, "use_qalora = True is not merged"),
        ({"bias": "some"}, "bias = 'some', expected one of none, all, lora_only"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": "experts.w"}, "target_parameters = experts.w, expected names"),
        ({"target_parameters": ["a.w"], "alpha_pattern": {"w": 2}}, "target_parameters with rank_pattern or alpha"),
        ({"target_parameters": ["q_proj.w"]}, "fits none, or several, of model.layers.7.q_proj.w"),
        ({"some_later_setting": 1}, "some_later_setting"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base too"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "changes the base too"),
        ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "'olora' with fan_in_fan_out"),
        ({"r": 0}, "r = 0, expected a positive number"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": math.nan}, "lora_alpha = nan"),
        ({"rank_pattern": [1]}, "expected numbers by pattern"),
        ({"rank_pattern": {"q": "8"}}, r"rank_pattern\['q'\] = '8'"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+": 1}}, "repeats too much"),
        ({"alpha_pattern": {".*.*.*.*": 1}}, "repeats too much"),
        ({"alpha_pattern": {"a?" * 40: 1}}, "repeats too much"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path, base, config, message):
    a, b = factors(6, 4)
    tensors = {"model.layers.0.q_proj.lora_A.weight": a, "model.layers.0.q_proj.lora_B.weight": b}
    if "target_parameters" in config:
        tensors = {name.replace("layers.0", "layers.7"): value for name, value in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        merged(base, adapter(tmp_path / "l", tensors, **config))


def test_factors_of_experts_change_each_by_its_own_part(tmp_path):
    E, r, F, D = 3, 2, 5, 4
    at = "model.layers.0.mlp.experts"
    gate_up, down = RNG.normal(size=(E, 2 * F, D)).astype(np.float32), RNG.normal(size=(E, D, F)).astype(np.float32)
    single = {f"{at}.{e}.{name}.weight": np.ascontiguousarray(part) for e in range(E) for name, part in
              (("gate_proj", gate_up[e, :F]), ("up_proj", gate_up[e, F:]), ("down_proj", down[e]))}  # fmt: skip
    turned = {f"{at}.gate_up_proj": gate_up.swapaxes(1, 2).copy(), f"{at}.down_proj": down.swapaxes(1, 2).copy()}
    (a1, b1), (a2, b2) = factors(2 * F, D, E * r), factors(D, F, E * r)
    tensors = {f"{at}.base_layer.lora_A.weight": a1, f"{at}.base_layer.lora_B.weight": b1,
               f"{at}.lora_A.weight": a2, f"{at}.lora_B.weight": b2}  # fmt: skip
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = adapter(tmp_path / "lora", tensors, target_parameters=names, target_modules=[])
    wanted = [w + 1.5 * np.einsum("ore,eri->eoi", b.reshape(len(b), r, E), a.reshape(E, r, -1))
              for w, a, b in ((gate_up, a1, b1), (down, a2, b2))]  # fmt: skip
    found = {}
    for what, held in {"single": single, "turned": turned}.items():
        (tmp_path / what).mkdir()
        save_file(held, tmp_path / what / "model.safetensors")
        found[what] = merged(open_tensors(tmp_path / what), lora)
    for name, whole in zip(("gate_up_proj", "down_proj"), wanted):
        index = (slice(1, 3), slice(1, 4), slice(2, 4))
        read = found["turned"].read(f"{at}.{name}", index)
        np.testing.assert_allclose(read, whole.swapaxes(1, 2)[index], rtol=1e-5, atol=1e-5)
    for e in range(E):
        for name, whole in (
            ("gate_proj", wanted[0][e, :F]),
            ("up_proj", wanted[0][e, F:]),
            ("down_proj", wanted[1][e]),
        ):
            read = found["single"].read(f"{at}.{e}.{name}.weight", (slice(1, 4), slice(1, 3)))
            np.testing.assert_allclose(read, whole[1:4, 1:3], rtol=1e-5, atol=1e-5)


def test_all_misfits_are_said_at_once(tmp_path, base):
    a, b = factors(6, 4)
    wide, _ = factors(6, 5, rank=3)
    tensors = {
        "model.layers.7.q_proj.lora_A.weight": a,
        "model.layers.0.q_proj.lora_B.weight": b,
        "model.layers.1.q_proj.lora_A.weight": wide,
        "model.layers.1.q_proj.lora_B.weight": b,
        "model.norm.lora_A.weight": a,
        "model.norm.lora_B.weight": b,
        "model.layers.0.q_proj.lora_magnitude_vector": b,
        "lm_head.weight": np.ones((10, 4), np.float32),
    }
    with pytest.raises(CheckpointError) as error:
        merged(base, adapter(tmp_path / "l", tensors))
    for part in (
        "'base_model.model.model.layers.7.q_proj.lora_A.weight' belongs to no tensor of the base",
        "'base_model.model.model.layers.0.q_proj.lora_B.weight' lacks its partner",
        "layers.1.q_proj.lora_A.weight' has shape (3, 5), expected (2, 4)",
        "updates a tensor of shape (4,)",
        "lm_head.weight' has shape (10, 4), expected (9, 4)",
    ):
        assert part in str(error.value)
    assert len(error.value.problems) == 5


def test_two_spellings_of_one_factor_are_refused(tmp_path, base):
    a, b = factors(6, 4)
    path = "model.layers.0.q_proj.lora"
    tensors = {f"{path}_A.weight": a, f"{path}_A.default.weight": a, f"{path}_B.weight": b}
    with pytest.raises(CheckpointError, match="second of its kind"):
        merged(base, adapter(tmp_path / "l", tensors))


def test_base_id(tmp_path, base):
    assert not is_adapter(tmp_path / "base")
    folder = adapter(tmp_path / "l", {})
    assert is_adapter(folder)
    assert base_id(folder) == "org/base"
    assert base_id(adapter(folder, {}, revision="v2")) == "org/base@v2"
    with pytest.raises(CheckpointError, match="base_model_name_or_path is missing"):
        base_id(adapter(folder, {}, base_model_name_or_path=None))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model.* found adapter_config\.json"):
        merged(base, folder)


def llama(torch, transformers):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 11, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def llama_with_biases(torch, transformers):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 11, "num_hidden_layers": 2}
    biases = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **biases, num_attention_heads=2))


def gpt2(torch, transformers):
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 11, "n_positions": 8}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids))


PEFT_CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "llama patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 5},
            "alpha_pattern": {r"model.layers.[0]\..*": 9},
        },
    ),
    "llama embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama DoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "llama DoRA of the embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "llama bias of the factors": (llama_with_biases, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "llama all biases": (llama_with_biases, {"target_modules": ["q_proj"], "bias": "all"}),
    "llama bias without biases": (llama, {"target_modules": ["q_proj"], "bias": "lora_only", "loftq_config": {"a": 4}}),
    "gpt2 all biases": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "llama tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}),
    "llama tokens by module": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 0]}},
    ),
    "llama PiSSA": (llama, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "llama OLoRA": (llama, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"}),
    "gpt2 PiSSA": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}),
    "gpt2 DoRA": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]},
    ),
}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CASES)
def test_agrees_with_peft(tmp_path, case):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    torch.manual_seed(0)
    make, config = PEFT_CASES[case]
    model = make(torch, transformers)
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=4, **config))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "lora")
    wanted = tuned.merge_and_unload().state_dict()
    base = open_tensors(tmp_path / "base")
    store = merged(base, tmp_path / "lora")
    assert any(np.any(store.read(name) != base.read(name)) for name in store.names())
    for name in store.names():
        np.testing.assert_allclose(store.read(name), wanted[name].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_adapted_experts_agree_with_peft(tmp_path, family):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "vocab_size": 11, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, num_experts=4, num_local_experts=4)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj"], target_parameters=names)
    )
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "lora")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    base, wanted = open_tensors(tmp_path / "base"), open_tensors(tmp_path / "merged")
    store = merged(base, tmp_path / "lora")
    changed = [name for name in store.names() if np.any(store.read(name) != base.read(name))]
    assert any(".experts." in name for name in changed)
    for name in store.names():
        np.testing.assert_allclose(store.read(name), wanted.read(name), rtol=1e-5, atol=1e-5, err_msg=name)
