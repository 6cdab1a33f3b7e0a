"""Many devices: the numbers of one, no weight is made whole on the way, and the memory of one layer at a time."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import diagonal, slow
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tracing_jax.axes import axis_table
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import correlations, forward_pass, losses, paired, path_losses
from tracing_jax.interpolation import path_groups
from tracing_jax.matching import match_weights
from tracing_jax.matching.coordinate import coordinates
from tracing_jax.matching.similarity import weight_pairs, weight_similarity
from tracing_jax.rewrites import identity
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, sharded
from tracing_jax.statistics.cosine import cosines
from tracing_jax.tree import flatten, select

MESHES = [(8, 1), (2, 4), (1, 8)]
TAPS = ("residual", "heads", "units")
_SIZES = {"num_kv_heads": 8, "mlp_dim": 80, "vocab_size": 104}
MHA = tiny.llama_mha(**_SIZES | {"q_group": 1})
GQA = tiny.qwen3_gqa(**_SIZES | {"q_group": 2})
ARCHS = {
    "MHA": MHA,
    "GQA": GQA,
    "norms of all queries": tiny.olmo2_gqa(**_SIZES | {"q_group": 2}),
    "GPT-2": tiny.gpt2(num_kv_heads=8, head_dim=3, mlp_dim=80, vocab_size=104),
    "experts": tiny.mixtral(**_SIZES),
}
TOKENS = np.random.default_rng(0).integers(104, size=(8, 7), dtype=np.int32)  # no activation is as large as a weight
STEPS = (forward_pass.embed_step, forward_pass.block_step, losses._loss_step, paired._accumulate_step)
ALPHAS = (0.0, 0.5, 1.0)
GROUPS = path_groups(attn=True, emb=True)


def _pair(arch, mesh):
    return [in_memory(sharded(tiny.model(arch, seed), mesh)) for seed in (0, 1)]


def _losses(arch, mesh):
    return path_losses(*_pair(arch, mesh), TOKENS, ALPHAS, GROUPS, Compute(mesh))


def _correlations(arch, mesh):
    return list(correlations(*_pair(arch, mesh), paired_one_to_one(TOKENS, TOKENS), TAPS, Compute(mesh, batch_size=8)))


@pytest.fixture(scope="module")
def on_one(request):
    """Architecture, losses, correlations and models on one device."""
    arch, mesh = ARCHS[request.param], make_mesh()
    return arch, _losses(arch, mesh), _correlations(arch, mesh), _pair(arch, mesh)


on_each_mesh = pytest.mark.parametrize(("on_one", "mesh"), diagonal(["MHA", "GQA"], MESHES), indirect=["on_one"])


@pytest.mark.slow
@on_each_mesh
def test_losses_are_those_of_one_device(mesh, on_one):
    arch, expected, *_ = on_one
    np.testing.assert_allclose(_losses(arch, make_mesh(*mesh)), expected, atol=2e-5)


@pytest.mark.slow
@on_each_mesh
def test_correlations_are_those_of_one_device(mesh, on_one):
    arch, _, expected, _ = on_one
    for found, wanted in zip(_correlations(arch, make_mesh(*mesh)), expected, strict=True):
        for tap in TAPS:
            np.testing.assert_allclose(found.by_tap[tap], wanted.by_tap[tap], atol=2e-5, err_msg=tap)


@pytest.mark.slow
@on_each_mesh
def test_what_assignments_read_is_that_of_one_device(mesh, on_one):
    arch, _, _, whole = on_one
    split, table = _pair(arch, make_mesh(*mesh)), axis_table(arch)
    axes = table.axes_of_kind(["embed", "mlp", "kv_heads", "q_group"])
    start, found = identity(table, axes), {}
    for name, pair in (("whole", whole), ("split", split)):
        pairs = weight_pairs(pair[0].params, pair[1].params, table, {})
        found[name] = [
            weight_similarity(pairs, coordinate, start, pairs.leaves_with_axes([coordinate.axis])).units
            for coordinate in coordinates(table, axes)
        ]
        ups = [model.params["layers"]["1"]["mlp"]["up_proj"]["kernel"].T for model in pair]
        found[name].append(np.asarray(cosines(*ups)))
    for a, b in zip(found["split"], found["whole"], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    matched = [match_weights(*(m.params for m in pair), table, axes).permutations for pair in (split, whole)]
    for axis in axes:
        np.testing.assert_array_equal(matched[0][axis], matched[1][axis])


def _alive():
    return jax.devices()[0].client.live_executables()


@pytest.fixture
def programs():
    """Returns a function that lists the programs of these steps that were compiled since the test began."""
    for step in STEPS:
        step.clear_cache()
    before = _alive()

    def made(*names):
        modules = {f"jit_{name}" for name in names}
        found = [program for program in _alive() if program not in before]
        return [program for program in found if program.hlo_modules()[0].name in modules]

    return made


_MOVES = re.compile(r"= (\(?\w+\[.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")


def _moved_sizes(program):
    """Returns how many elements each result has that a device gets from others, sums aside."""
    text = program.hlo_modules()[0].to_string()
    shapes = [shape for found in _MOVES.findall(text) for shape in re.findall(r"\w+\[([\d,]*)\]", found)]
    return {math.prod(map(int, shape.split(","))) for shape in shapes if shape}


def _split_sizes(arch, mesh):
    """Returns the sizes of the matrices that a mesh splits, and of each expert's alone."""
    params = in_memory(sharded(tiny.model(arch), mesh)).params
    matrices = [leaf for name, leaf in flatten(params).items() if name.endswith(("kernel", "embedding"))]
    sizes = {leaf.size for leaf in matrices if not leaf.is_fully_replicated}
    experts = flatten(select(params["layers"]["0"], ("mlp/gate_proj",))) if arch.num_experts else {}
    return sizes | {leaf.size // leaf.shape[0] for leaf in experts.values()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), diagonal(ARCHS, [(1, 8), (2, 4)]))
def test_no_weight_is_gathered_whole(name, mesh, programs):
    arch, mesh = ARCHS[name], make_mesh(*mesh)
    _losses(arch, mesh)
    _correlations(arch, mesh)
    made = programs(*(step.__name__ for step in STEPS))
    assert len(made) == 2 + 2 + 1 + 1  # embedding and block both along a path and of one model
    weights = _split_sizes(arch, mesh)
    for program in made:
        assert not _moved_sizes(program) & weights


def test_a_weight_that_is_gathered_whole_would_be_seen():
    mesh = make_mesh(1, 8)
    up = in_memory(sharded(tiny.model(GQA), mesh)).params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    gather = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, P()))
    program = gather.lower(up).compile().runtime_executable()
    assert _moved_sizes(program) & _split_sizes(GQA, mesh) == {up.size}


@pytest.mark.parametrize("mesh", [(2, 4), slow((8, 1)), slow((1, 8))], ids=str)
def test_all_layers_and_batches_share_one_program(mesh, programs):
    pair, compute = _pair(GQA, make_mesh(*mesh)), Compute(make_mesh(*mesh), batch_size=8)
    tokens = np.concatenate([TOKENS, TOKENS[::-1]])
    path_losses(*pair, tokens, ALPHAS, GROUPS, compute)
    assert [len(programs(step.__name__)) for step in STEPS] == [1, 1, 1, 0]
    list(correlations(*pair, paired_one_to_one(tokens, tokens), TAPS, compute))
    assert [len(programs(step.__name__)) for step in STEPS] == [2, 2, 1, 1]


def _largest(programs):
    return max(programs, key=lambda program: program.get_compiled_memory_stats().argument_size_in_bytes)


@pytest.mark.slow
def test_memory_of_the_block_step_grows_with_the_hidden_states_alone(programs):
    """Memory holds one interpolated layer at a time, and hidden states are donated, not copied."""
    arch = tiny.llama_mha(embed_dim=64, mlp_dim=512, num_layers=1, layer_ropes=(0,), layer_windows=(None,))
    base, ft = (InMemory(arch, tiny.params_of(arch, seed)) for seed in (0, 1))
    hidden_bytes = TOKENS[:1].size * 64 * 4  # of one point
    layer_bytes = sum(4 * leaf.size for leaf in flatten(base.layer(0)).values())
    temporary = {}
    for made, count in enumerate((2, 16)):
        path_losses(base, ft, TOKENS[:1] % 61, np.linspace(0, 1, count), GROUPS, Compute(make_mesh()))
        assert len(programs("block_step")) == made + 1
        program = _largest(programs("block_step"))
        memory = program.get_compiled_memory_stats()
        assert memory.alias_size_in_bytes >= count * hidden_bytes  # donated
        temporary[count] = memory.temp_size_in_bytes
    assert temporary[2] > layer_bytes / 2  # an interpolated layer is among it
    assert temporary[16] - temporary[2] < 2 * 14 * hidden_bytes < layer_bytes


@pytest.mark.slow
def test_of_two_layers_in_bfloat16_only_the_point_between_is_made_in_float32(programs):
    arch = tiny.llama_mha(embed_dim=64, mlp_dim=512, num_layers=1, layer_ropes=(0,), layer_windows=(None,))
    params = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny.params_of(arch, seed)) for seed in (0, 1)]
    base, ft = (InMemory(arch, tree) for tree in params)
    path_losses(base, ft, TOKENS[:1] % 61, ALPHAS, GROUPS, Compute(make_mesh()))
    (program,) = programs("block_step")
    in_float32 = sum(4 * leaf.size for leaf in flatten(base.layer(0)).values())
    assert program.get_compiled_memory_stats().temp_size_in_bytes < 1.5 * in_float32
