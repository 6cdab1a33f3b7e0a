"""Taps name the inner activations of a block: those that numpy computes from one another in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tracing_jax.axes import axis_table, kind_of
from tracing_jax.models import apply_block, apply_embed, apply_mlp, layer_inputs, mlp_leaves, tap_axes, taps_of

TOKENS = np.random.default_rng(0).integers(61, size=(2, 7), dtype=np.int32)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def tapped(arch):
    """Returns a block's weights and taps in float64, and what it receives and returns."""
    model = tiny.model(arch)
    x = apply_embed(arch, model.embed(), jnp.asarray(TOKENS), jnp.float32)
    y, taps, cache, _ = apply_block(arch, model.layer(0), x, layer_inputs(arch, 0), taps=taps_of(arch))
    assert cache is None
    without = apply_block(arch, model.layer(0), x, layer_inputs(arch, 0))
    assert without.taps == {}
    np.testing.assert_allclose(without.hidden, y, atol=1e-6)
    weights = {name: {k: np.asarray(v, np.float64) for k, v in p.items()} for name, p in model.layer(0)["mlp"].items()}
    return weights, {tap: np.asarray(found, np.float64) for tap, found in taps.items()}, np.asarray(y, np.float64)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("arch", [tiny.llama_mha(), tiny.olmo2_gqa(), tiny.gpt2(), tiny.mixtral()])
def test_taps_have_the_axes_that_are_said(arch):
    _, taps, _ = tapped(arch)
    sizes = {kind_of(axis): size for axis, size in axis_table(arch).sizes.items()}
    assert tuple(taps) == taps_of(arch) == tuple(tap_axes(arch))
    for tap, kinds in tap_axes(arch).items():
        assert taps[tap].shape == (2, 7, *(sizes[kind] for kind in kinds)), tap


def test_taps_of_a_gated_mlp():
    mlp, taps, _ = tapped(tiny.llama_mha())
    for tap in ("gate", "up"):
        weights = mlp[f"{tap}_proj"]
        close(taps[tap], taps["mlp_input"] @ weights["kernel"] + weights["bias"])
    close(taps["units"], silu(taps["gate"]) * taps["up"])
    close(taps["mlp_output"], taps["units"] @ mlp["down_proj"]["kernel"] + mlp["down_proj"]["bias"])


def test_taps_of_an_mlp_without_a_gate():
    mlp, taps, y = tapped(tiny.gpt2())
    close(taps["up"], taps["mlp_input"] @ mlp["up_proj"]["kernel"] + mlp["up_proj"]["bias"])
    close(taps["units"], gelu_tanh(taps["up"]))
    close(taps["mlp_output"], taps["units"] @ mlp["down_proj"]["kernel"] + mlp["down_proj"]["bias"])
    hidden = y - taps["mlp_output"]  # what the MLP's norm reads
    layer = tiny.params_of(tiny.gpt2())["layers"]["0"]["mlp_norm"]
    normed = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    close(taps["mlp_input"], normed * np.asarray(layer["scale"]) + np.asarray(layer["bias"]))


def test_taps_of_experts_are_those_of_all_and_the_output_is_that_of_the_chosen():
    mlp, taps, _ = tapped(tiny.mixtral())
    gates, ups, downs = (mlp[f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
    for e in range(3):
        close(taps["gate"][:, :, e], taps["mlp_input"] @ gates[e])
        close(taps["up"][:, :, e], taps["mlp_input"] @ ups[e])
    close(taps["units"], silu(taps["gate"]) * taps["up"])
    scores = np.exp(taps["mlp_input"] @ mlp["router"]["kernel"])
    expected = np.zeros_like(taps["mlp_output"])
    for b, t in np.ndindex(*TOKENS.shape):
        chosen = np.argsort(scores[b, t])[-2:]
        for e in chosen:
            share = scores[b, t, e] / scores[b, t, chosen].sum()
            expected[b, t] += share * (taps["units"][b, t, e] @ downs[e])
    close(taps["mlp_output"], expected)


def test_post_norms_come_after_the_output_tap():
    _, taps, y = tapped(tiny.olmo2_gqa())
    assert not np.allclose(taps["mlp_input"] + taps["mlp_output"], y)
    scale = np.asarray(tiny.params_of(tiny.olmo2_gqa())["layers"]["0"]["mlp_post_norm"]["scale"])
    output = taps["mlp_output"]
    normed = output / np.sqrt((output**2).mean(-1, keepdims=True) + tiny.olmo2_gqa().norm_eps) * scale
    close(taps["mlp_input"] + normed, y)  # without pre-norms the MLP reads the hidden state itself


def test_a_tap_that_a_model_does_not_have_is_refused():
    arch = tiny.gpt2()
    x = jnp.zeros((1, 2, 24))
    with pytest.raises(
        ValueError, match="unknown taps gate; there are residual, heads, mlp_input, up, units, mlp_output"
    ):
        apply_block(arch, tiny.model(arch).layer(0), x, layer_inputs(arch, 0), taps=("gate", "units"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [tiny.llama_mha(), tiny.olmo2_gqa(), tiny.gpt2(), tiny.mixtral(), tiny.mixtral(activation="gelu")],
    ids=lambda arch: f"{arch.family}-{arch.activation}",
)
def test_the_mlp_alone_needs_only_the_weights_behind_its_taps(arch):
    model = tiny.model(arch)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 24)), jnp.float32)
    # With silent attention the MLP of the whole block reads x itself.
    layer = model.layer(0)
    silent = layer["attn"] | {"o_proj": {name: 0 * leaf for name, leaf in layer["attn"]["o_proj"].items()}}
    for tap in [tap for tap in ("gate", "up", "units") if tap in taps_of(arch)]:
        whole = apply_block(arch, layer | {"attn": silent}, x, layer_inputs(arch, 0), taps=(tap,)).taps[tap]
        alone = apply_mlp(arch, model.layer(0, mlp_leaves(arch, (tap,))), x, (tap,))[tap]
        close(alone, np.asarray(whole))
