"""Linear recurrences beside attention: what they compute, what they remember, and which rewrites keep them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from parity_cases import CASES

from tracing_jax.alignment import align
from tracing_jax.axes import axis_table
from tracing_jax.forward import forward, logits
from tracing_jax.models import empty_cache
from tracing_jax.models.delta_net import gated_delta_rule
from tracing_jax.models.mlp import mlp
from tracing_jax.rewrites import Permutation, ValueMixing, draw_rewrites, random_permutations
from tracing_jax.sources import MlpsAsLayers, in_memory, one_mlp, rewritten
from tracing_jax.tree import flatten

NAMES = ("qwen3_next-default", "qwen3_5_text-one_group", "nemotron_h-two_in_a_row", "nemotron_h-latent")


def _delta_rule64(q, k, v, decay, beta, state):
    """Returns the state and the outputs, token by token, for one text of one group."""
    outputs = np.zeros(v.shape)
    for t, g in np.ndindex(v.shape[:2]):
        state[g] *= np.exp(decay[t, g])
        state[g] += beta[t, g] * np.outer(k[t], v[t, g] - state[g].T @ k[t])
        outputs[t, g] = state[g].T @ q[t] / np.sqrt(q.shape[-1])
    return state, outputs


@pytest.mark.parametrize("length", [1, 64, 150])
def test_chunks_of_a_delta_net_give_what_its_recurrence_gives(length):
    rng, (G, N, U), text = np.random.default_rng(0), (2, 6, 5), max(1, length - 3)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, length, N)))
    v, state = rng.normal(size=(length, G, U)), rng.normal(size=(G, N, U))
    decay, beta = -rng.exponential(0.3, (length, G)), rng.uniform(size=(length, G))
    decay[::17] = -90.0  # all is forgotten
    arrays = (q[:, None], k[:, None], v[:, None], decay[:, None], beta[:, None], state[None])
    is_text = np.arange(length) < text  # padding follows
    found = gated_delta_rule(*(jnp.asarray(x[None], jnp.float32) for x in arrays), jnp.asarray(is_text[None]))
    end, outputs = _delta_rule64(q[:text], k[:text], v[:text], decay, beta, state.copy())
    np.testing.assert_allclose(found[0][0, 0], end, atol=3e-5)
    np.testing.assert_allclose(found[1][0, :text, 0], outputs, atol=3e-5)


@pytest.mark.parametrize("name", [slow(NAMES[0]), *NAMES[1:3], slow(NAMES[3])])
def test_a_text_read_in_pieces_has_the_states_of_the_whole(name):
    model, tokens = CASES[name].source(), jnp.asarray(CASES[name].tokens())
    whole = [output.hidden for output in forward(model, [tokens], jnp.float32)][-1]
    caches = [empty_cache(model.arch, i, len(tokens), 12, jnp.float32) for i in range(model.arch.num_layers)]
    for start, stop in ((0, 7), (7, 12)):
        # Two tokens of padding follow the first piece, and change nothing.
        piece = jnp.pad(tokens[:, start:stop], [(0, 0), (0, 2 if start == 0 else 0)])
        at = jnp.arange(piece.shape[1])
        positions = jnp.tile(jnp.where(at < stop - start, start + at, -1), (len(tokens), 1))
        outputs = list(forward(model, [piece], jnp.float32, positions=[positions], caches=[caches]))
        caches = [output.cache for output in outputs if output.cache is not None]
        error = jnp.abs(outputs[-1].hidden[:, : stop - start] - whole[:, start:stop]).max()
        assert error < 2e-5 * jnp.abs(whole).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_rewrite_keeps_the_function(name):
    model, tokens = CASES[name].source(), CASES[name].tokens()
    rewrites = draw_rewrites("all", jax.random.key(3), model.arch, without=("rename",))
    assert model.arch.head_gate == ("values" not in {rewrite.name for rewrite in rewrites})
    assert {"permute", "rotate", "gains", "identity"} <= {rewrite.name for rewrite in rewrites}
    expected, found = logits(model, tokens), logits(in_memory(rewritten(model, rewrites)), tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_heads_of_a_recurrence_move_with_their_group():
    model, tokens = CASES["qwen3_next-default"].source(), CASES["qwen3_next-default"].tokens()
    table = axis_table(model.arch)
    moved = random_permutations(jax.random.key(1), table, ["state_groups", "state_heads"])
    assert set(moved) == {f"layers/{i}/delta_net/state_{kind}" for i in (0, 2) for kind in ("groups", "heads")}
    assert any((p != np.arange(p.shape[-1])).any() for p in moved.values())
    expected, found = logits(model, tokens), logits(in_memory(rewritten(model, [Permutation(moved)])), tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    for kind in ("state_keys", "state_values", "tap"):  # alike in several heads, or not free at all
        axis = f"layers/0/delta_net/{kind}"
        turned = np.arange(table.sizes[axis], dtype=np.int32)[::-1]
        assert "may not be permuted" in Permutation({axis: turned}).data_problems(model.arch)[0]
    assert "gated" in ValueMixing.unsupported(model.arch)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_alignment_finds_the_heads_of_recurrences(name):
    model = CASES[name].source()
    planted = draw_rewrites("permute", jax.random.key(7), model.arch)
    ft = in_memory(rewritten(model, planted))
    kinds = sorted({axis.rsplit("/", 1)[-1] for axis in planted[0].permutations})
    assert {"state_groups", "state_heads"} <= set(kinds)
    found = align(model, ft, kinds, evidence="weights")
    leaves, expected = (flatten(in_memory(source).params) for source in (rewritten(ft, found.rewrites), model))
    assert all(np.array_equal(leaves[leaf], expected[leaf]) for leaf in expected)


@pytest.mark.slow
def test_repeated_kv_heads_are_found_where_only_some_layers_have_them():
    model = CASES["qwen3_next-default"].source()
    ft = in_memory(rewritten(model, draw_rewrites("repeat", jax.random.key(0), model.arch)))
    assert ft.arch.num_kv_heads > model.arch.num_kv_heads
    found = align(model, ft, ("copies",), evidence="weights")
    assert rewritten(ft, found.rewrites).arch.num_kv_heads == model.arch.num_kv_heads


def test_an_expert_alone_has_the_projections_around_experts_in_its_weights():
    model = CASES["nemotron_h-latent"].source()
    views = MlpsAsLayers(model)
    at = views.places.index((0, 2))
    whole, alone = model.layer(0)["mlp"], views.layer(at)["mlp"]
    assert alone.keys() == one_mlp(model, 0, 2).layer(0)["mlp"].keys() == {"up_proj", "down_proj"}
    x = np.random.default_rng(0).normal(size=(3, model.arch.embed_dim))
    read, up, down, back = (
        np.asarray(kernel, np.float64)
        for kernel in (
            whole["latent_in"]["kernel"], whole["up_proj"]["kernel"][2], whole["down_proj"]["kernel"][2],
            whole["latent_out"]["kernel"],
        )
    )  # fmt: skip
    expected = np.maximum(x @ read @ up, 0) ** 2 @ down @ back
    found = mlp(views.arch, alone, jnp.asarray(x[None], jnp.float32))[0][0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
