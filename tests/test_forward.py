"""The engine: losses are those of the logits, the same on any mesh, for one compilation whatever the depth."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import diagonal, slow

from tracing_jax.axes import axis_table
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import (
    activations,
    correlations,
    forward_pass,
    logits,
    losses,
    path_losses,
    stream_pass,
    token_losses,
)
from tracing_jax.interpolation import interpolate, interpolated_leaves, path_groups
from tracing_jax.run_cache import RunCache, WriteBudget
from tracing_jax.sharding import Compute, leaf_spec, make_mesh
from tracing_jax.sources import InMemory, in_memory, sharded

ALL = path_groups(attn=True, emb=True)


@pytest.fixture(scope="module")
def one_device():
    return Compute(make_mesh(1, 1), batch_size=4)


def blocks(arch, n=5, length=16, seed=0):
    return np.random.default_rng(seed).integers(arch.vocab_size, size=(n, length), dtype=np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", [tiny.llama_mha(), tiny.gemma_mqa(), tiny.gpt2(), tiny.mixtral()], ids=lambda arch: arch.family
)
def test_losses_are_the_cross_entropy_of_the_logits(arch, one_device):
    model, tokens = tiny.model(arch), blocks(arch)
    scores = logits(model, tokens).astype(np.float64)[:, :-1]
    log_z = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    expected = log_z - np.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(token_losses(model, tokens, one_device), expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "groups"),
    diagonal(["llama_mha", "qwen3_gqa", "gpt2", "mixtral"], [ALL, path_groups(False, False), path_groups(True, False)]),
)
def test_path_is_the_loss_of_the_interpolated_tree(family, groups, one_device):
    arch = getattr(tiny, family)()
    base, ft, tokens = tiny.model(arch, 0), tiny.model(arch, 1), blocks(arch)
    moving = interpolated_leaves(axis_table(arch), groups)
    found = path_losses(base, ft, tokens, (0.0, 0.3, 1.0), groups, one_device)
    for row, alpha in zip(found, (0.0, 0.3, 1.0), strict=True):
        point = InMemory(arch, interpolate(base.params, ft.params, alpha, moving))
        np.testing.assert_allclose(row, token_losses(point, tokens, one_device), atol=2e-5)


def test_path_over_no_group_reads_no_other_model(one_device):
    model = tiny.model(tiny.llama_mha())
    losses = path_losses(model, None, blocks(model.arch), (0.0, 1.0), (), one_device)
    np.testing.assert_array_equal(losses[0], losses[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        (tiny.qwen3_gqa, (2, 4)),
        slow(tiny.qwen3_gqa, (8, 1)),
        slow(tiny.gpt2, (1, 2)),
        (tiny.mixtral, (2, 4)),
    ],
)
def test_sharded_equals_unsharded(family, mesh, one_device):
    arch = family(num_kv_heads=4, q_group=2, mlp_dim=32)
    base, ft, tokens = tiny.model(arch, 0), tiny.model(arch, 1), blocks(arch)
    expected = path_losses(base, ft, tokens, (0.0, 0.5, 1.0), ALL, one_device)
    compute = Compute(make_mesh(*mesh), batch_size=4)
    on_mesh = [in_memory(sharded(model, compute.mesh)) for model in (base, ft)]
    np.testing.assert_allclose(path_losses(*on_mesh, tokens, (0.0, 0.5, 1.0), ALL, compute), expected, atol=2e-5)


def test_weights_are_split_where_the_table_says():
    arch = dataclasses.replace(tiny.qwen3_gqa(), num_kv_heads=4, mlp_dim=32)
    mesh, table = make_mesh(2, 4), axis_table(arch)
    params = in_memory(sharded(tiny.model(arch), mesh)).params
    up = params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (24, 8)
    k = params["layers"]["1"]["attn"]["k_proj"]["kernel"]
    assert k.sharding.shard_shape(k.shape) == (24, 1, 4)
    experts = in_memory(sharded(tiny.model(tiny.mixtral(mlp_dim=32, num_experts=4)), mesh)).layer(0)["mlp"]
    assert experts["down_proj"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "model", None)
    assert experts["router"]["kernel"].sharding.is_fully_replicated
    # 61 tokens do not divide by 4 devices: kept whole rather than refused.
    assert leaf_spec(table.leaves["embed/embedding"], table, mesh) == jax.sharding.PartitionSpec(None, None)


def test_depth_and_batches_compile_nothing_new(one_device):
    """One compilation of the block step per shape; windows and ropes that differ between layers are data."""

    def run(layers):
        arch = tiny.llama_mha(
            num_layers=layers,
            rope_frequencies=((1.0, 0.1), (1.0, 0.01)),
            layer_ropes=(0, 1, 1, 0, 1)[:layers],
            layer_windows=(None, 3, 7, 2, None)[:layers],
        )
        base, ft, tokens = tiny.model(arch), tiny.model(arch, 1), blocks(arch, 9)
        forward_pass.block_step.clear_cache()
        path_losses(base, ft, tokens, (0.0, 1.0), ALL, one_device)
        yield forward_pass.block_step._cache_size()
        token_losses(base, tokens, one_device)
        yield forward_pass.block_step._cache_size()
        list(correlations(base, ft, paired_one_to_one(tokens, tokens), ("units",), one_device))
        yield forward_pass.block_step._cache_size()

    # Along a path, of one model, and with taps: three programs, each for all layers, batches and models.
    assert list(run(2)) == list(run(5)) == [1, 2, 3]


@dataclasses.dataclass
class Streamed:
    """A source that is not in memory, and counts how often each part is read."""

    model: InMemory
    reads: Counter = dataclasses.field(default_factory=Counter)

    @property
    def arch(self):
        return self.model.arch

    def embed(self):
        self.reads["embed"] += 1
        return self.model.embed()

    def layer(self, index, only=()):
        self.reads[index] += 1
        return self.model.layer(index, only)

    def head(self):
        self.reads["head"] += 1
        return self.model.head()


@pytest.mark.parametrize("arch", [tiny.llama_mha(), tiny.gemma_mqa()], ids=lambda arch: arch.family)
def test_streamed_models_give_the_same_losses_and_are_read_once(arch, one_device):
    models, tokens, alphas = (tiny.model(arch), tiny.model(arch, 1)), blocks(arch, 9), (0.0, 0.5, 1.0)
    resident = path_losses(*models, tokens, alphas, ALL, one_device)
    base, ft = (Streamed(model) for model in models)
    assert np.array_equal(path_losses(base, ft, tokens, alphas, ALL, one_device), resident)
    for source in (base, ft):
        assert [source.reads[i] for i in range(arch.num_layers)] == [1] * arch.num_layers


def test_streamed_models_are_read_again_where_hidden_states_would_not_fit(one_device, monkeypatch):
    model, tokens = tiny.model(tiny.llama_mha()), blocks(tiny.llama_mha(), 9)
    source = Streamed(model)
    monkeypatch.setattr(forward_pass, "_HIDDEN_BYTES", 2 * 4 * 16 * model.arch.embed_dim * 4)  # of two batches
    assert np.array_equal(token_losses(source, tokens, one_device), token_losses(model, tokens, one_device))
    assert source.reads[0] == 2


@pytest.mark.parametrize("stops_at", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_an_interrupted_pass_continues_at_the_layer_where_it_stopped(tmp_path, monkeypatch, stops_at, dtype):
    monkeypatch.setattr(WriteBudget, "allows", lambda budget, num_bytes: num_bytes > 0)
    one_device = Compute(make_mesh(1, 1), 4, dtype)
    arch = tiny.llama_mha(num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3)
    model, tokens, run_cache = tiny.model(arch), blocks(arch, 9), RunCache(tmp_path)

    class Interrupted(Streamed):
        def layer(self, index, only=()):
            if index == stops_at:
                raise KeyboardInterrupt
            return super().layer(index, only)

    with pytest.raises(KeyboardInterrupt):
        token_losses(Interrupted(model), tokens, one_device, run_cache=run_cache)
    again = Streamed(model)
    found = token_losses(again, tokens, one_device, run_cache=run_cache)
    assert np.array_equal(found, token_losses(model, tokens, one_device))
    assert sorted(i for i in again.reads if i not in ("embed", "head")) == list(range(stops_at, 3))
    finished = Streamed(model)
    assert np.array_equal(token_losses(finished, tokens, one_device, run_cache=run_cache), found)
    assert not finished.reads


def test_window_hides_what_lies_further_back():
    arch = tiny.llama_mha(num_layers=1, layer_ropes=(0,), layer_windows=(4,))
    model, tokens = tiny.model(arch), blocks(arch, 1)
    other = tokens.copy()
    other[0, 3] = (other[0, 3] + 1) % arch.vocab_size
    moved = np.abs(logits(model, tokens) - logits(model, other)).max(-1)[0] > 1e-6
    assert moved.tolist() == [3 <= t < 7 for t in range(16)]


def test_logits_are_sliced_along_the_block(one_device, monkeypatch):
    model = tiny.model(tiny.llama_mha())
    expected = token_losses(model, blocks(model.arch), one_device)
    monkeypatch.setattr(forward_pass, "LOGITS_BYTES", 4 * 61 * 4 * 3)  # three positions of a batch of four
    losses._loss_step.clear_cache()
    np.testing.assert_allclose(token_losses(model, blocks(model.arch), one_device), expected, atol=1e-5)
    losses._loss_step.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize(("length", "most"), [(17, 5), (17, 16), (16, 4), (13, 1), (7, 100)])
def test_positions_are_sliced_no_further_than_the_limit_asks_whatever_the_length(length, most, monkeypatch):
    """A prime number of positions is not computed position by position."""
    monkeypatch.setattr(forward_pass, "LOGITS_BYTES", most * 8)
    x = jnp.arange(2.0 * length * 3).reshape(2, length, 3)
    shapes = []

    def function(x):
        shapes.append(x.shape)
        return x.sum(-1)

    with jax.disable_jit():
        np.testing.assert_array_equal(forward_pass.map_slices(function, [x], 8), x.sum(-1))
    assert len(shapes) == math.ceil(length / most)
    assert len(set(shapes)) == 1
    assert shapes[0][1] <= most


@pytest.mark.slow
def test_bf16_weights_are_computed_in_the_asked_dtype(one_device):
    model = tiny.model(tiny.llama_mha(), dtype=jnp.bfloat16)
    tokens = blocks(model.arch)
    exact = token_losses(model, tokens, one_device).mean()
    rough = token_losses(model, tokens, Compute(one_device.mesh, 4, jnp.bfloat16)).mean()
    assert exact != rough
    assert abs(exact - rough) < 0.1


@pytest.mark.parametrize(("tokens", "message"), [
    (np.full((1, 4), 61, np.int32), "vocabulary has 61"),
    (np.full((1, 4), -1, np.int32), "run from -1"),
    (np.zeros((0, 4), np.int32), "no token blocks"),
])  # fmt: skip
def test_tokens_outside_the_vocabulary_are_refused(tokens, message, one_device):
    with pytest.raises(ValueError, match=message):
        token_losses(tiny.model(tiny.llama_mha()), tokens, one_device)


def test_blocks_longer_than_the_learned_positions_are_refused(one_device):
    model = tiny.model(tiny.gpt2(num_positions=8))
    tokens, problem = blocks(model.arch, length=9), "blocks of 9 tokens, the model has learned 8 positions"
    with pytest.raises(ValueError, match=problem):
        token_losses(model, tokens, one_device)
    with pytest.raises(ValueError, match=problem):
        logits(model, tokens)
    assert logits(model, tokens[:, :8]).shape == (5, 8, 61)


@pytest.mark.parametrize("mesh", [(9, 1), (0, 1), (2, 5)])
def test_meshes_that_do_not_fit_are_refused(mesh):
    with pytest.raises(ValueError, match="8 are there"):
        make_mesh(*mesh)
    assert make_mesh(-1, 2).shape == {"data": 4, "model": 2}


@pytest.mark.parametrize("arch", [
    slow(tiny.qwen3_gqa()), tiny.gpt2(), slow(tiny.mixtral()), slow(tiny.olmo2_gqa()),
    slow(tiny.deepseek(rope_frequencies=((1.0,),))),
])  # fmt: skip
def test_effects_of_heads_are_what_the_logits_lose_without_them(arch, one_device):
    """The difference of the same function of the predictions for a head a little louder and a little less loud."""
    source, tokens = tiny.model(arch, 0), np.random.default_rng(0).integers(61, size=(1, 8), dtype=np.int32)
    valid = np.broadcast_to(np.arange(8) >= 4, tokens.shape)
    noise = np.random.default_rng(0).standard_normal((1, 8, arch.vocab_size), np.float32)
    found = stream_pass(source, tokens, valid, one_device).head_effects
    predicted = np.asarray(logits(source, tokens), np.float64)
    weights = np.exp((predicted - np.logaddexp.reduce(predicted, axis=-1, keepdims=True)) / 2) * noise
    i, step = arch.num_layers - 1, 1e-2  # in the last layer a head changes the predictions of its own token alone
    for head in range(0, arch.num_kv_heads * arch.q_group, 2):
        k, g = divmod(head, arch.q_group)
        changed = []
        for factor in (1 + step, 1 - step):
            params = jax.tree.map(jnp.asarray, source.params)
            kernel = params["layers"][str(i)]["attn"]["o_proj"]["kernel"]
            params["layers"][str(i)]["attn"]["o_proj"]["kernel"] = kernel.at[k, g].multiply(factor)
            own = np.asarray(logits(InMemory(arch, params), tokens), np.float64)
            changed.append((weights * (own - np.logaddexp.reduce(own, axis=-1, keepdims=True))).sum(axis=-1)[valid])
        expected = (changed[0] - changed[1]) / (2 * step)
        np.testing.assert_allclose(found[i][:, head], expected, rtol=0.02, atol=1e-3 * np.abs(found[i]).max())


@pytest.mark.parametrize("arch", [tiny.qwen3_gqa(), slow(tiny.gpt2()), slow(tiny.mixtral()), slow(tiny.olmo2_gqa())])
def test_gradients_at_the_stream_are_those_of_the_rest_of_the_model(arch, one_device):
    """Of the same random function of the predicted tokens, taken through all later layers at once."""
    source, tokens = tiny.model(arch, 0), np.random.default_rng(0).integers(61, size=(3, 12), dtype=np.int32)
    valid = np.broadcast_to(np.arange(12) >= 4, tokens.shape)
    found = stream_pass(source, tokens, valid, one_device)
    noise = np.random.default_rng(0).standard_normal((3, 12, arch.vocab_size), np.float32)
    weights = jnp.exp(jax.nn.log_softmax(logits(source, tokens)) / 2) * noise

    def of_predictions(x, layer):
        for output in forward_pass.forward(source, [jnp.asarray(tokens)], jnp.float32, start=(layer, [x])):
            x = output.hidden
        return (weights * jax.nn.log_softmax(forward_pass.head_logits(arch, forward_pass.head_of(source), x))).sum()

    gradient = jax.jit(jax.grad(of_predictions), static_argnums=1)
    states = [jnp.copy(output.hidden) for output in forward_pass.forward(source, [jnp.asarray(tokens)], jnp.float32)]
    for i in range(1, arch.num_layers + 1):
        expected = gradient(states[i - 1], i)
        np.testing.assert_allclose(found.gradients[i], expected[valid], rtol=1e-3, atol=1e-5)
    assert found.gradients[0].shape == (24, arch.embed_dim)
    at = np.broadcast_to(np.arange(12), tokens.shape)
    for i, taps in activations(source, tokens, at, valid, ("mlp_input",), one_device):
        np.testing.assert_allclose(found.mlp_inputs[i], taps["mlp_input"], atol=1e-6)
