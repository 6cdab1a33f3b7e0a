"""What keeps a model's function cannot make it a relative of another: units that do nothing, copies, and orders."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
import tiny
from cases import slow

import tracing_jax as tj
from benchmarks.feature_forgeries import feature_forgeries, features_removed, features_written_by_nobody
from benchmarks.forgeries import (
    cancelled,
    cancelled_near_zero,
    experts_added,
    experts_between_others,
    forgeries,
    layers_added,
    mostly_dead,
    on_device,
    on_host,
    ordered_like_base,
    planted,
    sorted_units,
    split_by_gate,
    tokens_answered_alike,
    turned_and_ordered_like_base,
    widened,
)
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import activation_spread, logits
from tracing_jax.forward.activation_spread import FLOAT64_ACTIVATIONS
from tracing_jax.models import init_params
from tracing_jax.models.layers import ACTIVATIONS
from tracing_jax.models.mlp import mlp
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import (
    Pair,
    Vocabularies,
    features_in_place,
    heads_in_place,
    hidden_by,
    inactive_layers,
    obscured_layers,
    token_directions,
    unit_effects,
)
from tracing_jax.statistics import distinct_units as distinct_units_module
from tracing_jax.statistics.calibration import null_of
from tracing_jax.statistics.comparison import Comparison
from tracing_jax.statistics.csh import Csh
from tracing_jax.statistics.csu import Csu, CsuAll
from tracing_jax.statistics.distinct_units import distinct_units, stream_size
from tracing_jax.statistics.features_in_place import FeaturesInPlace
from tracing_jax.statistics.head_kernels import explained_by_others, inactive_heads
from tracing_jax.statistics.head_matrices import head_matrices
from tracing_jax.statistics.heads_in_place import HeadsInPlace
from tracing_jax.statistics.match import Match
from tracing_jax.statistics.match_all import MatchAll, unexplained
from tracing_jax.statistics.match_crossfit import MatchCrossfit
from tracing_jax.statistics.match_heads import MatchHeads
from tracing_jax.statistics.match_io import MatchIo
from tracing_jax.statistics.match_mlps import MatchMlps
from tracing_jax.statistics.match_moments import MatchMoments
from tracing_jax.statistics.nulls import agreement_log_sf
from tracing_jax.statistics.repeated_layers import repeated_layers
from tracing_jax.statistics.shared_tokens import TokenRows
from tracing_jax.statistics.statistic import Result, Test
from tracing_jax.statistics.unit_outputs import reached_experts
from tracing_jax.statistics.unwritten_features import share_unwritten, with_unwritten_features
from tracing_jax.tree import flatten, unflatten

F = 64
ARCH = tiny.qwen3_gqa(num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3, mlp_dim=F)
IDS = np.arange(61, dtype=np.int32)
TOKENS = np.random.default_rng(0).integers(61, size=(8, 24), dtype=np.int32)
BLOCKS = paired_one_to_one(TOKENS, TOKENS)
TESTS = (Csu(), Csh(blocks=4, block_size=32), Match(), MatchMoments())


def model(seed, noise=0.0, of=None):
    """A random model with units of unequal size, or a noisy copy of one."""
    rng = np.random.default_rng(seed)
    if of is not None:
        params = jax.tree.map(
            lambda leaf: leaf + noise * leaf.std() * rng.standard_normal(leaf.shape).astype(np.float32), of.params
        )
        return InMemory(of.arch, params)
    params = on_host(InMemory(ARCH, init_params(ARCH, jax.random.key(seed)))).params
    for i in range(ARCH.num_layers):
        size = np.exp(0.5 * rng.standard_normal(F)).astype(np.float32)
        for name in ("gate_proj", "up_proj"):
            params["layers"][str(i)]["mlp"][name]["kernel"] = params["layers"][str(i)]["mlp"][name]["kernel"] * size
    return InMemory(ARCH, params)


def predicted(model, tokens):
    return logits(on_device(model), tokens)


def result(statistic, base, other):
    base, other = on_device(base), on_device(other)
    pair = Pair(base, other, Vocabularies(True, IDS, IDS), TOKENS, Compute(make_mesh(), 8), 0, blocks=BLOCKS)
    return statistic.compute(pair)


def firm_log10_p(statistic, base, other):
    found = result(statistic, base, other)
    firm = found.log10_p if found.firm_log10_p is None else found.firm_log10_p
    return 0.0 if firm is None else firm


def all_forgeries(arch):
    return forgeries(arch, IDS[-6:]) | feature_forgeries(arch)


FORGERIES = all_forgeries(ARCH)
OTHERS = {"no gate": tiny.gpt2(mlp_dim=32), "experts": tiny.mixtral(), "one expert": tiny.mixtral(experts_per_token=1)}
CASES = [
    *(("gated", name) for name in FORGERIES),
    *((kind, name) for kind, arch in OTHERS.items() for name in all_forgeries(arch)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if "rounded" not in case[1]])
def test_a_forgery_keeps_both_functions(kind, name):
    base, other = (model(i) if kind == "gated" else on_host(tiny.model(OTHERS[kind], i)) for i in (0, 1))
    forge = all_forgeries(base.arch)[name]
    for before, after in zip((base, other), forge(base, other, np.random.default_rng(0))):
        tokens = TOKENS if "token" not in name else np.minimum(TOKENS, 54)  # those that stay as they were
        moved = np.abs(predicted(after, tokens) - predicted(before, tokens))
        if "token" in name:
            moved = moved[..., :54]
        assert moved.max() < (2e-2 if "nearly" in name else 2e-4)


def name_of(statistic):
    return type(statistic).__name__


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
@pytest.mark.parametrize("statistic", TESTS, ids=name_of)
@pytest.mark.parametrize(
    "forge",
    [
        planted(32),
        planted(32, closed=True),
        planted(16, paired=True),
        planted(32, output=1e-3),
        widened(4),
        ordered_like_base("up_proj"),
        slow(mostly_dead),
        slow(split_by_gate),
        slow(cancelled),
    ],
    ids=["dead", "closed", "cancelling", "nearly dead", "copied", "ordered", "mostly dead", "split", "cancelled"],
)
def test_no_forgery_makes_independent_models_related(statistic, forge, seed):
    forged = forge(model(2 * seed), model(2 * seed + 1), np.random.default_rng(seed))
    assert firm_log10_p(statistic, *forged) > -3


def with_active_units(patch):
    """Takes every unit, layer and expert for one that acts, as before what keeps them from it was read."""
    patch.setattr(distinct_units_module, "_least_output", lambda model, layer: 0.0)
    patch.setattr(distinct_units_module, "is_reached", lambda model, layer: True)
    patch.setattr(distinct_units_module, "curved_outputs", lambda norms, constants, arch, degree: norms)
    patch.setattr(features_in_place, "inactive_layers", lambda model: [])
    for module in (features_in_place, heads_in_place):
        patch.setattr(module, "inactive_attention", lambda model: [])


MANY_HEADS = tiny.llama_mha(num_kv_heads=12, head_dim=8, mlp_dim=F)


class InPlace:
    """In place of a random generator: units are added in front, in the order that they have in base."""

    standard_normal = np.random.default_rng(0).standard_normal
    dirichlet = np.random.default_rng(0).dirichlet

    def permutation(self, count):
        return np.concatenate([np.arange(F, count), np.arange(F)])


@pytest.mark.parametrize(
    ("statistic", "forge", "arch"),
    [
        (Csu(), cancelled_near_zero, ARCH),
        (Csu(), cancelled_near_zero, tiny.gpt2(mlp_dim=F)),
        (Csu(), planted(32, closed=True), ARCH),
        (Csu(), planted(32, closed=True), tiny.gpt2(mlp_dim=F)),
        (MatchMoments(), layers_added, ARCH),
        (MatchMlps(), experts_added, tiny.mixtral(mlp_dim=F)),
        (MatchMlps(), experts_between_others, tiny.mixtral(mlp_dim=F, experts_per_token=1)),
        (HeadsInPlace(), functools.partial(layers_added, in_front=True), MANY_HEADS),
    ],
    ids=lambda value: getattr(value, "family", getattr(value, "__name__", type(value).__name__)),
)
def test_what_does_nothing_is_no_evidence(statistic, forge, arch, monkeypatch):
    """Units that a bias keeps closed, layers that write next to nothing, and experts behind all others."""
    base, other = (on_host(tiny.model(arch, seed)) for seed in (0, 1))
    base, forged = forge(base, other, InPlace())
    assert firm_log10_p(statistic, base, forged) > -3
    assert firm_log10_p(statistic, base, model(5, 0.1, base)) < -3  # the test detects a relation where there is one
    with_active_units(monkeypatch)
    assert result(statistic, base, forged).log10_p < -3  # and without the check of what acts it finds evidence


def test_rows_on_features_that_no_token_has_are_no_evidence(monkeypatch):
    """A model half of whose features nothing writes can have another's rows there; so can one rotate them away."""
    base, narrow = (on_host(tiny.model(ARCH, seed)) for seed in (0, 1))
    half, leaves = ARCH.embed_dim // 2, dict(flatten(narrow.params))
    for name in leaves:
        if name.endswith(("embed/embedding", "o_proj/kernel", "down_proj/kernel")):
            leaves[name] = np.array(leaves[name])
            leaves[name][..., half:] = 0
    narrow = InMemory(ARCH, unflatten(dict(leaves)))
    for name, theirs in flatten(base.params).items():
        if name.endswith(("gate_proj/kernel", "up_proj/kernel")):
            leaves[name] = np.concatenate([leaves[name][:half], 30 * theirs[half:]])
    forged = InMemory(ARCH, unflatten(leaves))
    np.testing.assert_allclose(predicted(forged, TOKENS), predicted(narrow, TOKENS), rtol=0, atol=1e-5)
    rotated = on_host(in_memory(rewritten(forged, draw_rewrites("rotate", jax.random.key(0), ARCH))))
    for model in (forged, rotated):
        assert firm_log10_p(Csu(), base, model) > -3
        assert [len(distinct_units(model, i).kept) for i in range(ARCH.num_layers)] == [0] * ARCH.num_layers
        assert obscured_layers(model) == [*range(ARCH.num_layers)]
    assert all(len(distinct_units(base, i).kept) > F - 4 for i in range(ARCH.num_layers))
    monkeypatch.setattr(token_directions, "LEAST_OF_EMBEDDINGS", 0.0)
    forged = InMemory(ARCH, forged.params)  # nothing is known of it yet
    assert result(Csu(), base, forged).log10_p < -3  # evidence without


@pytest.mark.parametrize("projection", ["gate_proj", "down_proj"])
def test_a_unit_with_a_huge_row_hides_nothing_that_does_nothing(projection):
    """With the others zero it does nothing, and must not make what other units write look finite beside it or not."""
    base, other = (on_host(model(seed)) for seed in (0, 1))
    _, forged = planted(32, output=1e-7)(base, other, np.random.default_rng(0))
    leaves = dict(flatten(forged.params))
    expected = [distinct_units(forged, i).kept for i in range(ARCH.num_layers)]
    for i in range(ARCH.num_layers):
        dead = np.setdiff1d(np.arange(forged.arch.mlp_dim), expected[i])[0]
        for name in ("gate_proj", "up_proj", "down_proj"):
            kernel = np.moveaxis(np.array(leaves[f"layers/{i}/mlp/{name}/kernel"]), 0, int(name != "down_proj"))
            kernel[dead] = 1e20 if name == projection else 0
            leaves[f"layers/{i}/mlp/{name}/kernel"] = np.moveaxis(kernel, 0, int(name != "down_proj"))
    huge = InMemory(forged.arch, unflatten(leaves))
    for i, kept in enumerate(expected):
        np.testing.assert_array_equal(distinct_units(huge, i).kept, kept)
    assert stream_size(huge, ARCH.num_layers) == pytest.approx(stream_size(forged, ARCH.num_layers))


def test_rows_of_tokens_that_no_text_has_do_not_say_what_is_read():
    """There can be more of them than of others: features of theirs alone are no evidence all the same."""
    arch = dataclasses.replace(ARCH, vocab_size=461)
    own = on_host(InMemory(arch, init_params(arch, jax.random.key(1))))
    half, leaves = arch.embed_dim // 2, dict(flatten(own.params))
    embedding = np.array(leaves["embed/embedding"])
    embedding[:61, half:] = 0
    leaves["embed/embedding"] = embedding
    for name in leaves:
        if name.endswith(("gate_proj/kernel", "up_proj/kernel")):
            leaves[name] = np.array(leaves[name])
            leaves[name][half:] *= 30
    unknown, known = (InMemory(arch, unflatten(dict(leaves))) for _ in range(2))
    Pair(known, known, Vocabularies(True, IDS, IDS, text_ids=(IDS, IDS)), None, Compute(make_mesh(), 8), 0)
    assert len(distinct_units(unknown, 0).kept) > F - 4
    assert len(distinct_units(known, 0).kept) == 0


@pytest.mark.parametrize(
    "statistic",
    [Match(("weights",)), *map(slow, (Csh(blocks=4, block_size=32), MatchIo(), MatchMlps()))],
    ids=name_of,
)
def test_tokens_that_no_text_has_are_no_evidence_and_hide_none(statistic):
    """Any embedding can be given to them: so that units of strangers answer alike, or those of relatives do not."""
    arch = dataclasses.replace(ARCH, vocab_size=464, embed_dim=128)
    ids, used, unused = np.arange(464, dtype=np.int32), np.arange(464) < 64, np.arange(64, 464)
    base, other = (on_host(InMemory(arch, init_params(arch, jax.random.key(seed)))) for seed in (0, 1))
    alike = tokens_answered_alike(unused)(base, other, np.random.default_rng(0))[1]
    np.testing.assert_allclose(predicted(alike, TOKENS)[..., used], predicted(other, TOKENS)[..., used], atol=1e-4)
    leaves = dict(flatten(base.params))
    noise = 10 * np.random.default_rng(1).standard_normal((400, arch.embed_dim))
    leaves["embed/embedding"] = np.concatenate([leaves["embed/embedding"][used], noise.astype(np.float32)])
    hidden = InMemory(arch, unflatten(leaves))

    def found(model, **known):
        text_ids = (ids[used],) * 2
        vocabularies = Vocabularies(True, ids, ids, text_ids=text_ids, text_blocks=BLOCKS, **known)
        pair = Pair(base, model, vocabularies, None, Compute(make_mesh(), 8), 0)
        return statistic.compute(pair)

    assert found(alike, in_text=used).log10_p > -1.3
    assert found(hidden, in_text=used).deciding_log10_p < -6
    unknown = found(alike, known=False)
    assert unknown.deciding_log10_p == 0.0
    assert unknown.blind_to
    if isinstance(statistic, Match | MatchMlps):  # the others compare more than what units read of tokens
        assert unknown.log10_p < -3
        assert "without a tokenizer" in unknown.reservation


def test_rows_that_a_rotation_and_an_order_fit_are_no_evidence():
    """Neither changes a model's function; fitted to both models they put all units in place, and alike."""
    base, other = (on_host(tiny.model(ARCH, seed)) for seed in (0, 1))
    _, forged = turned_and_ordered_like_base(base, other, np.random.default_rng(0))
    np.testing.assert_allclose(predicted(forged, TOKENS), predicted(other, TOKENS), rtol=0, atol=1e-4)
    found = Csu().compute(Pair(base, forged, Vocabularies(True, IDS, IDS), TOKENS, Compute(make_mesh(), 8), 0))
    assert found.log10_p < -100
    assert found.firm_log10_p == 0.0
    assert firm_log10_p(Csu(), base, on_host(model(2, noise=0.3, of=base))) < -20


def test_features_in_place_are_never_firm():
    """Whoever has both models can choose much of what features are compared on."""
    base = model(0)
    assert firm_log10_p(FeaturesInPlace(), base, base) == 0


@pytest.mark.parametrize("arch", [ARCH, tiny.gpt2(mlp_dim=32)], ids=["gated", "gateless"])
def test_units_of_one_gate_are_no_evidence_unless_all_their_rows_are_alike(arch):
    """Not even where a relation is hidden by them: tests that have no units left clear nobody."""
    base, other = (on_host(tiny.model(arch, seed)) for seed in (0, 1))
    _, forged = cancelled(base, other, np.random.default_rng(0))
    for i in range(arch.num_layers):
        found = distinct_units(forged, i)
        assert found.mixed == forged.arch.mlp_dim - arch.mlp_dim
        assert (
            found.kept.min() >= found.mixed
        )  # its own units; one or two of them may write too little beside the others
        assert len(found.kept) >= arch.mlp_dim - 2
    if arch.gated:
        _, hidden = split_by_gate(other, base, np.random.default_rng(0))
        assert obscured_layers(hidden) == [*range(arch.num_layers)]
    assert obscured_layers(base) == []
    given, hidden_too = (hidden_by("match", arch, arch, False, obscured) for obscured in (False, True))
    assert (given, hidden_too) == ((), ("layers most of whose MLP units are no evidence",))


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("arch", [ARCH, tiny.gpt2(mlp_dim=64)], ids=["gated", "gateless"])
def test_units_whose_two_rows_are_alike_are_no_evidence(arch, layers):
    """Matchings by one and by the other agree by themselves, in the layers of two strangers that have such units."""
    layers = layers[: arch.num_layers]

    def alike(seed):
        found = on_host(tiny.model(arch, seed))
        for i in layers:
            own = found.params["layers"][str(i)]["mlp"]
            two = ("gate_proj", "up_proj") if arch.gated else ("up_proj", "down_proj")
            one, other = (np.asarray(own[name]["kernel"]) for name in two)
            own[two[1]]["kernel"] = 0.2 * other + (one if arch.gated else one.T * other.std() / one.std())
        return found

    base, other = alike(0), alike(1)
    for i in range(arch.num_layers):
        found = distinct_units(base, i)
        assert len(found.kept) <= 0.1 * found.total if i in layers else len(found.kept) > 0.8 * found.total
        assert found.is_obscured == (i in layers)
        assert found.alike >= (0.9 * found.total if i in layers else 0)
    for statistic in (MatchIo(), *((Match(("weights",)), MatchMoments()) if arch.gated else ())):
        assert firm_log10_p(statistic, base, other) == 0
    if layers == (0,):
        assert firm_log10_p(MatchIo(), base, base) < -6


@pytest.mark.parametrize("kind", ["gated", *OTHERS])
def test_rows_in_directions_that_nothing_writes_make_no_pair_related(kind):
    """They may be another model's: those of base, beside the model's own, on features that are always zero."""
    base, other = (model(i) if kind == "gated" else on_host(tiny.model(OTHERS[kind], i)) for i in (0, 1))
    assert share_unwritten(base) < 0.02
    for length in (0.5, 2.0, 8.0):
        _, forged = features_written_by_nobody(length)(base, other, np.random.default_rng(0))
        assert share_unwritten(forged) > 0.1
    part = features_written_by_nobody(2.0)(base, other, np.random.default_rng(0))[1]
    own = features_written_by_nobody(0.0)(base, other, np.random.default_rng(0))[1]
    for i in range(part.arch.num_layers):  # in a fifth of the units alone, and in no head
        mlp_part, mlp_own = (m.params["layers"][str(i)]["mlp"] for m in (part, own))
        for name in {"gate_proj", "up_proj"} & mlp_part.keys():
            few = np.array(mlp_own[name]["kernel"])
            few[..., ::5] = np.asarray(mlp_part[name]["kernel"])[..., ::5]
            mlp_own[name]["kernel"] = few
    if not part.arch.num_experts:
        assert share_unwritten(own) > 0.1
    pair = Pair(base, forged, Vocabularies(True, IDS, IDS), TOKENS, Compute(make_mesh(), 8), 0)
    found = Result(0.5, "x", -30.0, tests=[Test("t", -30.0, "Fisher", ["layer 0"], [-30.0], {"units": [30]})])
    reserved = with_unwritten_features(found, pair)
    assert reserved.firm_log10_p == 0
    assert "that nothing writes" in reserved.reservation
    assert "of those of ft" in reserved.reservation
    assert with_unwritten_features(found, dataclasses.replace(pair, ft=base)) == found
    if kind == "gated":
        _, forged = features_written_by_nobody(2.0)(base, other, np.random.default_rng(0))
        for statistic in (MatchMoments(), MatchCrossfit(), HeadsInPlace()):
            assert firm_log10_p(statistic, base, forged) > -3


def test_layers_that_agree_with_many_are_controls():
    """Not with one of base's alone, as a relative's do."""

    def table(agreeing):
        return [[Comparison(256, 256, 0.0, k, 0.0, agreement_log_sf(k, 256, 256)) for k in row] for row in agreeing]

    apart = table([[200, 1, 0], [2, 200, 1], [0, 1, 200], [1, 0, 2]])
    assert sorted(cell.agreeing for cell in unexplained(apart)) == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    stacked = [[64, 1], [1, 64]] * 8  # a model whose layers are repeated: as base, and as ft
    for counts in (stacked, np.transpose(stacked).tolist()):
        assert {cell.agreeing for cell in unexplained(table(counts))} == {1}
    some = [[90 + 3 * ((2 * i + j) % 5) for j in range(4)] for i in range(4)]
    assert len(unexplained(table(some))) >= 6
    assert null_of(unexplained(table(some)), [0.05], "").lam > 80


def test_copies_are_alike_the_first_of_their_group_and_units_that_do_nothing_link_no_two():
    layer = {name: np.array(leaf["kernel"]) for name, leaf in model(3).layer(1)["mlp"].items()}
    steps = np.linspace(0, 1, 40)[:, None]
    bridge = {  # from unit 0 to unit 1 in small steps, all of which write nothing
        "gate_proj": (1 - steps) * layer["gate_proj"][:, 0] + steps * layer["gate_proj"][:, 1],
        "up_proj": (1 - steps) * layer["up_proj"][:, 0] + steps * layer["up_proj"][:, 1],
    }
    longer = {name: {"kernel": np.concatenate([rows.T, layer[name]], axis=1)} for name, rows in bridge.items()}
    longer["down_proj"] = {"kernel": np.concatenate([np.zeros((40, ARCH.embed_dim), np.float32), layer["down_proj"]])}
    params = model(3).params
    params["layers"]["1"] = {**params["layers"]["1"], "mlp": longer}
    widths = (F, F + 40, F)
    found = distinct_units(InMemory(dataclasses.replace(ARCH, layer_mlp_dims=widths), params), 1)
    assert len(found.kept) == len(distinct_units(model(3), 1).kept)


def test_heads_that_write_nothing_are_another_models_perhaps():
    params = on_host(tiny.model(MANY_HEADS, 0)).params
    params["layers"]["0"]["attn"]["o_proj"]["kernel"] = np.array(params["layers"]["0"]["attn"]["o_proj"]["kernel"])
    params["layers"]["0"]["attn"]["o_proj"]["kernel"][3] *= 1e-7
    found = [inactive_heads(InMemory(MANY_HEADS, params), i) for i in range(MANY_HEADS.num_layers)]
    assert [np.argwhere(heads).tolist() for heads in found] == [[[3, 0]], *[[]] * (MANY_HEADS.num_layers - 1)]


def test_rows_of_some_tokens_do_not_change_which_layers_do_nothing():
    """Not zeros at the first ids, nor one token's embedding of any size."""
    _, longer = layers_added(model(0), model(1), np.random.default_rng(0))
    for changed, factor in ((slice(0, 20), 0.0), (slice(7, 8), 1e9)):
        embedding = np.array(longer.embed()["embedding"])
        embedding[changed] *= factor
        other = InMemory(longer.arch, {**longer.params, "embed": {"embedding": embedding}})
        assert inactive_layers(other) == [3, 4, 5]
        assert len(distinct_units(other, 1).kept) == len(distinct_units(model(1), 1).kept)


@pytest.mark.parametrize("gain", [1.0, 100.0])
def test_experts_are_reached_whatever_the_norm_before_the_router(gain):
    arch = tiny.mixtral(router=dataclasses.replace(tiny.mixtral().router, bias=True))
    params = jax.tree.map(np.array, tiny.model(arch, 0).params)
    layer = params["layers"]["0"]
    layer["mlp_norm"]["scale"] *= gain
    layer["mlp"]["router"]["kernel"] /= gain
    layer["mlp"]["router"]["bias"][:] = [0.0, 0.1, -0.1]
    assert reached_experts(InMemory(arch, params), 0).all()
    layer["mlp"]["router"]["bias"][1] = -1e4
    assert reached_experts(InMemory(arch, params), 0).tolist() == [True, False, True]


def test_layers_that_do_nothing_are_those_that_were_added():
    _, longer = layers_added(model(0), model(1), np.random.default_rng(0))
    assert inactive_layers(longer) == [3, 4, 5]
    for arch in (ARCH, tiny.gpt2(), tiny.olmo2_gqa(), tiny.gemma_mqa(), tiny.mixtral()):
        assert inactive_layers(tiny.model(arch, 0)) == []


KEPT = {"copied": widened(4), "sorted": sorted_units("up_proj")}
MOVED = {"dead": planted(32), "cancelling": planted(16, paired=True)}  # at random places: no unit stays in its own


@pytest.mark.parametrize(
    ("statistic", "forge"),
    [
        pytest.param(statistic, forge, id=f"{name}-{type(statistic).__name__}")
        for name, forge in (KEPT | MOVED).items()
        for statistic in (TESTS if name in KEPT else TESTS[2:])
        # Noise moves units that are sorted: of so few in place a rotation could be the cause.
        if not (name == "sorted" and isinstance(statistic, Csu))
    ],
)
def test_a_relative_is_found_all_the_same(statistic, forge):
    base = model(0)
    _, related = forge(model(5), model(0, 0.1, base), np.random.default_rng(0))
    widened_too, _ = forge(base, base, np.random.default_rng(0))
    assert firm_log10_p(statistic, widened_too, related) < -3


def beyond_polynomial(deviations, degree):
    """By sums over a fine grid, the root mean square of what SiLU gives beyond the polynomial that fits best."""
    grid = np.linspace(-9, 9, 3001)
    density = np.exp(-(grid**2) / 2) / np.exp(-(grid**2) / 2).sum()
    rest = []
    for z in deviations[:, None] * grid:
        silu = z / (1 + np.exp(-z))
        fit = np.polynomial.Polynomial.fit(z, silu, degree, w=np.sqrt(density))
        rest.append(np.sqrt(np.square(silu - fit(z)) @ density))
    return np.array(rest)


def test_distinct_units_are_those_of_float64():
    """Copies, scaled ones too, are merged; what writes nothing, alone or in sum, is left out."""
    base = model(3)
    mlp = {name: np.array(leaf["kernel"]) for name, leaf in base.layer(1)["mlp"].items()}
    mlp["gate_proj"][:, 5], mlp["up_proj"][:, 5] = mlp["gate_proj"][:, 2], -3 * mlp["up_proj"][:, 2]  # a copy
    mlp["gate_proj"][:, 9], mlp["up_proj"][:, 9] = mlp["gate_proj"][:, 7], 2 * mlp["up_proj"][:, 7]
    mlp["down_proj"][9] = -mlp["down_proj"][7] / 2  # 7 and 9 cancel
    mlp["down_proj"][20] = 0
    mlp["up_proj"][:, 30] = 0
    params = {**base.params, "layers": {**base.params["layers"]}}
    params["layers"]["1"] = {**params["layers"]["1"], "mlp": {name: {"kernel": leaf} for name, leaf in mlp.items()}}
    found = distinct_units(InMemory(ARCH, params), 1)
    down = mlp["down_proj"].astype(np.float64)
    down[2] -= 3 * down[5]
    gates, ups = (np.linalg.norm(mlp[name].T.astype(np.float64), axis=1) for name in ("gate_proj", "up_proj"))
    least = set()
    for degree in (1, 2):
        written = np.square(beyond_polynomial(gates, degree) * ups * np.linalg.norm(down, axis=1))
        written[[5, 7, 9, 20, 30]] = 0
        order = np.argsort(written)
        # Together a hundredth of what the layer writes beyond a line, or a parabola, of its gates.
        least |= set(order[np.cumsum(written[order]) <= 1e-4 * written.sum()])
    assert least > {5, 7, 9, 20, 30}
    assert (found.copies, found.inactive, found.total) == (2, len(least) - 2, F)
    assert sorted(set(range(F)) - set(found.kept)) == sorted(least)


def test_what_is_beyond_a_polynomial_is_computed_in_float64():
    z = np.linspace(-9, 9, 101)
    assert FLOAT64_ACTIVATIONS.keys() == ACTIVATIONS.keys()
    for name, activation in FLOAT64_ACTIVATIONS.items():
        np.testing.assert_allclose(activation(z), ACTIVATIONS[name](z.astype(np.float32)), atol=2e-6)
    far, short = np.float32([5.0]), np.float32([1e-3])  # a biased unit: the third derivative there, times 1e-9
    assert 0 < activation_spread(ARCH, far, short, 2)[0] < 1e-10


def test_units_whose_activation_stays_near_a_parabola_are_no_evidence():
    """They write more than the others, but sums of units of other gates can cancel what they write."""
    params = on_host(tiny.model(ARCH, 0)).params
    mlp = params["layers"]["1"]["mlp"]
    size, few = np.float32(1e-2), slice(0, 16)
    columns = np.r_[[size] * 16, [1] * (F - 16)].astype(np.float32)
    mlp["gate_proj"] = {"kernel": mlp["gate_proj"]["kernel"] * columns}
    mlp["down_proj"] = {"kernel": mlp["down_proj"]["kernel"] / columns[:, None] ** 2}
    assert np.array_equal(distinct_units(InMemory(ARCH, params), 1).kept, np.arange(F)[16:])
    mlp["gate_proj"] = {"kernel": mlp["gate_proj"]["kernel"] / columns}
    assert len(distinct_units(InMemory(ARCH, params), 1).kept[few]) == 16


@pytest.mark.parametrize("arch", [ARCH, tiny.gpt2(mlp_dim=48)], ids=["gated", "gateless"])
def test_kept_units_with_the_outputs_of_their_copies_compute_what_all_units_do(arch):
    """Units split or joined by pairs that cancel, in any order: one of each group stands for all that they write."""
    base = tiny.model(arch, 0)
    hidden = in_memory(rewritten(base, draw_rewrites("split,cancel,permute", jax.random.key(7), arch)))
    x = jax.random.normal(jax.random.key(0), (1, 5, arch.embed_dim))
    for i in range(arch.num_layers):
        found, params = distinct_units(hidden, i), hidden.layer(i)["mlp"]
        assert len(found.kept) == arch.mlp_dim < found.total
        own = {
            name: {leaf: value[..., found.kept] for leaf, value in params[name].items()}
            for name in ("gate_proj", "up_proj")
            if name in params
        }
        written = np.asarray(found.outputs(params["down_proj"]["kernel"]))[found.kept]
        own["down_proj"] = {**params["down_proj"], "kernel": written}
        expected, by_kept = (np.asarray(mlp(*side, x)[0]) for side in ((hidden.arch, params), (arch, own)))
        np.testing.assert_allclose(by_kept, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("by", ["gate_proj", "up_proj", "down_proj"])
def test_the_order_of_units_is_noticed_and_a_random_one_is_not(by):
    """Two models in order leave no random order: rank correlation is then no evidence. One such model is no matter."""
    base, other = model(0), model(1)
    forged = sorted_units(by)(base, other, np.random.default_rng(0))
    for i in range(ARCH.num_layers):
        assert min(distinct_units(forged[0], i).order_p) < 1e-6
        assert min(distinct_units(base, i).order_p) > 1e-3
    vocabularies = Vocabularies(True, IDS, IDS)
    compute = Compute(make_mesh(), 8)
    both, one = (Csu().compute(Pair(*pair, vocabularies, TOKENS, compute, 0)) for pair in (forged, (base, forged[1])))
    assert [test.decides for test in both.tests] == [False, True, False]
    assert [test.decides for test in one.tests] == [True, True, False]
    assert [premise["holds"] for premise in both.premises] == [False, False]
    assert "rank correlation" in both.notes[-1]


def test_rows_that_begin_at_the_identity_in_both_models_are_reserved_and_in_one_are_not():
    """Strangers with such rows are in place; a copy of a model that was drawn at random cannot be by chance."""

    def from_identity(source):
        kernels = {}
        for i in range(ARCH.num_layers):
            kernel = np.array(source.params["layers"][str(i)]["mlp"]["up_proj"]["kernel"], np.float32)
            units = np.arange(kernel.shape[1])
            kernel[units % len(kernel), units] += 3 * np.linalg.norm(kernel, axis=0)
            kernels[f"layers/{i}/mlp/up_proj/kernel"] = kernel
        return dataclasses.replace(source, params=unflatten(flatten(source.params) | kernels))

    base, other = (on_host(model(seed)) for seed in (0, 1))
    strangers = from_identity(base), from_identity(other)
    vocabularies = Vocabularies(True, IDS, IDS)
    compute = Compute(make_mesh(), 8)
    found = Csu().compute(Pair(*strangers, vocabularies, TOKENS, compute, 0))
    assert found.log10_p < -6
    assert found.firm_log10_p == 0.0
    assert "identity" in found.reservation
    matrices = {test.name: test for test in CsuAll().compute(Pair(*strangers, vocabularies, TOKENS, compute, 0)).tests}
    exact = matrices["agreement, exact null"]
    assert exact.log10_p > -3
    assert "layers/0/mlp/up_proj" not in exact.places
    copies = Csu().compute(Pair(base, base, vocabularies, TOKENS, compute, 0))
    assert copies.deciding_log10_p < -20
    one = Csu().compute(Pair(strangers[0], other, vocabularies, TOKENS, compute, 0))
    assert "identity" not in (one.reservation or "")
    moved = Csu().compute(Pair(strangers[0], model(2, noise=0.1, of=base), vocabularies, TOKENS, compute, 0))
    assert "identity" not in (moved.reservation or "")
    assert distinct_units(strangers[0], 0).identity_p < 1e-6 < 1e-3 < distinct_units(base, 0).identity_p


def test_embeddings_of_tokens_that_no_text_has_decide_nothing():
    """They can be any without a change of what a model does, and so the responses of its units to them."""
    arch = dataclasses.replace(ARCH, vocab_size=2000)
    base, other = (on_host(InMemory(arch, init_params(arch, jax.random.key(seed)))) for seed in (0, 1))
    ids, in_text = np.arange(2000, dtype=np.int32), np.arange(2000) % 5 < 3
    embedding = np.array(other.params["embed"]["embedding"])
    embedding[~in_text] = np.asarray(base.params["embed"]["embedding"])[~in_text]
    forged = dataclasses.replace(other, params=unflatten(flatten(other.params) | {"embed/embedding": embedding}))
    vocabularies = Vocabularies(True, ids, ids, in_text=in_text)
    for statistic in (Match(forms=("weights",)), MatchIo(), MatchHeads(), MatchAll(forms=("weights",))):
        given, found = (
            statistic.compute(Pair(base, ft, vocabularies, None, Compute(make_mesh(), 8), 0)) for ft in (other, forged)
        )
        assert [test.values for test in found.tests] == [test.values for test in given.tests], statistic
    few = dataclasses.replace(vocabularies, in_text=ids < 60)
    assert set(few.drawn(np.random.default_rng(0), 3000).tolist()) == set(ids.tolist())


@pytest.mark.slow
def test_a_gpt2_with_dead_units_of_another_is_not_its_relative():
    arch = dataclasses.replace(tiny.gpt2(), mlp_dim=48)
    base, other = (on_host(InMemory(arch, init_params(arch, jax.random.key(seed)))) for seed in (0, 1))
    mlp = {name: dict(leaf) for name, leaf in other.params["layers"]["0"]["mlp"].items()}
    source = base.params["layers"]["0"]["mlp"]
    mlp["up_proj"]["kernel"] = mlp["up_proj"]["kernel"].copy()
    mlp["up_proj"]["kernel"][:, :24] = source["up_proj"]["kernel"][:, :24]
    mlp["down_proj"]["kernel"] = mlp["down_proj"]["kernel"].copy()
    mlp["down_proj"]["kernel"][:24] = 0
    layers = {**other.params["layers"], "0": {**other.params["layers"]["0"], "mlp": mlp}}
    forged = InMemory(arch, {**other.params, "layers": layers})
    assert distinct_units(forged, 0).inactive == 24
    assert firm_log10_p(Csu(), base, forged) > -3


def test_units_on_features_that_the_first_layer_removes_are_no_evidence():
    """All tokens may have features that later layers never read: what units read is found by a forward pass."""
    removed = slice(24, 36)
    arch = dataclasses.replace(ARCH, embed_dim=36, layer_windows=(1, None, None))
    leaves = dict(flatten(on_host(InMemory(arch, init_params(arch, jax.random.key(0)))).params))
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((61, 36)).astype(np.float32)
    embedding[:, removed] *= 3
    leaves["embed/embedding"] = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    value, output = (np.zeros_like(leaves[f"layers/0/attn/{name}/kernel"]) for name in ("v_proj", "o_proj"))
    for k in range(3):  # of one query of each head, which attends to its own position alone
        for v in range(4):
            value[24 + 4 * k + v, k, v], output[k, 0, v, 24 + 4 * k + v] = 1, -1 / np.sqrt(36)
    leaves |= {"layers/0/attn/v_proj/kernel": value, "layers/0/attn/o_proj/kernel": output}
    for name in ("gate_proj", "up_proj"):
        kernel = leaves[f"layers/1/mlp/{name}/kernel"] = 10 * leaves[f"layers/1/mlp/{name}/kernel"]
        kernel[removed, :32], kernel[:24, :32], kernel[removed, 32:] = 1.5 * kernel[removed, :32], 0, 0
    by_embeddings, by_text = (InMemory(arch, unflatten(dict(leaves))) for _ in range(2))
    Pair(
        by_text,
        by_text,
        Vocabularies(True, IDS, IDS, text_blocks=BLOCKS),
        None,
        Compute(make_mesh(), 8),
        0,
    )
    assert len(distinct_units(by_embeddings, 1).kept) > F - 8
    kept = distinct_units(by_text, 1).kept
    assert len(kept) > 24
    assert kept.min() >= 32
    # Neither does the gain of a feature that is always zero change that.
    leaves["layers/1/mlp_norm/scale"] = np.where(np.arange(36) == 35, 2e6, 1).astype(np.float32)
    for name in ("embed/embedding", "layers/0/attn/o_proj/kernel"):
        leaves[name] = np.array(leaves[name])
        leaves[name][..., 35] = 0
    one_gain = InMemory(arch, unflatten(leaves))
    Pair(
        one_gain,
        one_gain,
        Vocabularies(True, IDS, IDS, text_blocks=BLOCKS),
        None,
        Compute(make_mesh(), 8),
        0,
    )
    assert distinct_units(one_gain, 1).kept.min(initial=F) >= 32


def test_units_that_agree_on_embeddings_and_not_on_a_text_are_reserved():
    """A first layer can remove another's embeddings; units that read them can be given to those that fit best."""
    base, other = model(0), model(1)
    for layer in other.params["layers"].values():  # what a layer adds counts beside embeddings, which become large
        layer["mlp"]["down_proj"]["kernel"] = 1e4 * layer["mlp"]["down_proj"]["kernel"]
    made = features_removed(base, other, np.random.default_rng(0))
    noisy = model(0, 0.3, of=base)
    text = Vocabularies(True, IDS, IDS, in_text=IDS >= 0, text_ids=(IDS, IDS), text_blocks=BLOCKS)
    order = [0, 2, 1, 3]
    moved = InMemory(made[1].arch, made[1].params | {"layers": {str(i): made[1].layer(j) for i, j in enumerate(order)}})

    def found(statistic, base, ft, vocabularies):
        sides = on_device(base), on_device(ft)
        return statistic.compute(Pair(*sides, vocabularies, None, Compute(make_mesh(), 8), 0))

    for statistic in (Match(forms=("weights",)), MatchAll(forms=("weights",)), MatchMlps()):
        for one, ft in (made, (made[0], moved)):
            if type(statistic) is Match and ft is moved:
                continue
            by_embeddings = found(statistic, one, ft, text)
            assert by_embeddings.log10_p < -3
            assert by_embeddings.deciding_log10_p > -0.5
            assert "not found to agree on a text" in by_embeddings.reservation
            # Without a text it cannot be asked.
            assert found(statistic, one, ft, Vocabularies(True, IDS, IDS)).deciding_log10_p < -3
        related = found(statistic, base, noisy, text)
        assert related.deciding_log10_p < -9
        if isinstance(statistic, MatchMlps):  # which compares units in place as well
            continue
        # Blocks that the two read otherwise say nothing of units: their evidence is not firm.
        few = dataclasses.replace(BLOCKS, valid=BLOCKS.valid & (np.arange(24) < 5))
        unpaired = found(statistic, base, noisy, dataclasses.replace(text, text_blocks=few))
        assert unpaired.deciding_log10_p > -0.5


def by_text_and_by_weights(arch, leaves):
    """A model of these leaves twice: one that is to read a text, one of which only the weights are looked at."""
    by_text, by_weights = (InMemory(arch, unflatten(dict(leaves))) for _ in range(2))
    Pair(
        by_text,
        by_text,
        Vocabularies(True, IDS, IDS, text_blocks=BLOCKS),
        None,
        Compute(make_mesh(), 8),
        0,
    )
    return by_text, by_weights


def test_what_units_write_to_features_that_nothing_reads_is_no_evidence():
    """The logits do not depend on it but by the norm of the stream, to second order."""
    arch, unread = dataclasses.replace(ARCH, embed_dim=36), slice(24, 36)
    leaves = dict(flatten(on_host(InMemory(arch, init_params(arch, jax.random.key(0)))).params))
    for name in leaves:
        if name.endswith(("q_proj/kernel", "k_proj/kernel", "v_proj/kernel", "gate_proj/kernel", "up_proj/kernel")):
            leaves[name] = np.array(leaves[name])
            leaves[name][unread] = 0
    leaves["embed/embedding"] = np.array(leaves["embed/embedding"])
    leaves["embed/embedding"][:, unread] = 0
    for i in range(3):
        down, output = (np.array(leaves[f"layers/{i}/{name}/kernel"]) for name in ("mlp/down_proj", "attn/o_proj"))
        down[:32, :24], down[:32, unread], down[32:, unread] = 0, 0.6 * down[:32, unread], 0
        output[..., unread] = 0
        leaves |= {f"layers/{i}/mlp/down_proj/kernel": down, f"layers/{i}/attn/o_proj/kernel": output}
    by_text, by_weights = by_text_and_by_weights(arch, leaves)
    for i in range(3):
        assert distinct_units(by_weights, i).kept.min() < 8
        kept = distinct_units(by_text, i).kept
        assert kept.min() >= 32
        assert len(kept) > 28


def heads_without_function(cancelling):
    """A model whose heads of kv heads 0 and 1 in layer 1 do nothing on a text, which their weights do not show.

    They read features that the first layer removes; or attend by these, and add what others of theirs take away.
    """
    removed = slice(24, 36)
    arch = dataclasses.replace(
        ARCH, embed_dim=36, layer_windows=(1, None, None), num_kv_heads=3, q_group=1, qk_norm=None
    )
    leaves = {name: np.array(leaf) for name, leaf in flatten(
        on_host(InMemory(arch, init_params(arch, jax.random.key(0)))).params).items()}  # fmt: skip
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((61, 36)).astype(np.float32)
    leaves["embed/embedding"] = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    H = arch.head_dim
    value, output = (np.zeros_like(leaves[f"layers/0/attn/{name}/kernel"]) for name in ("v_proj", "o_proj"))
    for k in range(3):  # attends to its own position alone
        for v in range(4):
            value[24 + 4 * k + v, k, v], output[k, 0, v, 24 + 4 * k + v] = 1, -1 / np.sqrt(36)
    leaves |= {"layers/0/attn/v_proj/kernel": value, "layers/0/attn/o_proj/kernel": output}
    leaves["layers/0/mlp/down_proj/kernel"][:, removed] = 0
    names = {name: f"layers/1/attn/{name}_proj/kernel" for name in "qkvo"}
    for name in "qkv":
        leaves[names[name]] *= 6
    if cancelling:
        for name, heads in (("q", np.s_[:, :2, 0]), ("k", np.s_[:, :2])):
            kernel = leaves[names[name]]
            kernel[heads] = np.where(np.isin(np.arange(36), np.r_[removed])[:, None, None], kernel[heads], 0)
        leaves[names["v"]][:, 1] = leaves[names["v"]][:, 0]
        leaves[names["o"]][1] = -leaves[names["o"]][0]
    else:
        leaves[names["v"]][:24, :2] = 0
    assert H >= 4
    return by_text_and_by_weights(arch, leaves)


@pytest.mark.parametrize("cancelling", [False, True])
def test_heads_whose_text_shows_that_they_do_nothing_are_no_evidence(cancelling):
    by_text, by_weights = heads_without_function(cancelling)
    assert not inactive_heads(by_weights, 1).any()
    assert inactive_heads(by_text, 1).ravel().tolist() == [True, True, False]
    for i in (0, 2):
        assert not inactive_heads(by_text, i).any()
    tokens = TokenRows(*(jax.numpy.asarray(by_text.params["embed"]["embedding"]),) * 2)
    shown, unseen = (head_matrices(model, 1, tokens)["output"] for model in (by_weights, by_text))
    np.testing.assert_array_equal(unseen[:2], 0)
    np.testing.assert_array_equal(unseen[2], shown[2])
    assert np.linalg.norm(shown, axis=1).min() > 0.9


def test_what_others_make_up_of_a_column_is_that_of_least_squares():
    columns = np.random.default_rng(0).standard_normal((80, 6))
    columns[:, 5] = columns[:, 0] - 2 * columns[:, 1] + 0.3 * columns[:, 2]
    found = explained_by_others(columns)
    for h in range(6):
        others = np.delete(columns, h, axis=1)
        rest = columns[:, h] - others @ np.linalg.lstsq(others, columns[:, h], rcond=None)[0]
        exact = 1 - np.square(rest).sum() / np.square(columns[:, h]).sum() * 80 / 75
        assert found[h] == pytest.approx(exact, abs=1e-6)
    assert (found > 0.98).tolist() == [True] * 3 + [False] * 2 + [True]
    many = np.random.default_rng(0).standard_normal((80, 64))
    many[:, 3] = -many[:, 60]
    assert np.flatnonzero(explained_by_others(many) > 0.98).tolist() == [3, 60]


def test_features_that_nothing_writes_and_the_head_reads_loudly_hide_no_unit():
    """Gradients are then large there, and what units write to other features is small beside them."""
    arch, unwritten = dataclasses.replace(ARCH, embed_dim=36, tied=False), slice(24, 36)
    leaves = dict(flatten(on_host(InMemory(arch, init_params(arch, jax.random.key(0)))).params))
    for name in leaves:
        if name.endswith(("embed/embedding", "down_proj/kernel", "o_proj/kernel")):
            leaves[name] = np.array(leaves[name])
            leaves[name][..., unwritten] = 0
    head = np.array(leaves["head/lm_head/kernel"])
    head[unwritten] = 0
    quiet, _ = by_text_and_by_weights(arch, leaves | {"head/lm_head/kernel": head.copy()})
    head[unwritten] = 100 * head.std() * np.random.default_rng(0).standard_normal((12, 61))
    loud, _ = by_text_and_by_weights(arch, leaves | {"head/lm_head/kernel": head})
    for i in range(3):
        expected = distinct_units(quiet, i).kept
        assert len(expected) > F - 12
        np.testing.assert_array_equal(distinct_units(loud, i).kept, expected)


def test_what_is_beyond_a_polynomial_on_a_text_is_what_numpy_leaves():
    """Of units that a text does not reach nothing is left, nor of those whose input is not finite."""
    gates = np.random.default_rng(0).normal(1, 2, (80, 5)).astype(np.float32)
    gates[:, 3], gates[0, 4] = 2.5, np.inf
    for degree in (1, 2):
        found = unit_effects.beyond_polynomial(gates, ARCH, degree)
        for f in range(3):
            z = gates[:, f].astype(np.float64)
            values = FLOAT64_ACTIVATIONS[ARCH.activation](z)
            np.testing.assert_allclose(found[:, f], values - np.polyval(np.polyfit(z, values, degree), z), atol=1e-9)
        assert not found[:, 3:].any()
    outputs, gradients = np.abs(gates[:, :3]), np.ones((80, 3))
    shares = unit_effects.shares_of_effect(outputs * [1, 2, 0], gradients)
    assert np.square(shares).sum() == pytest.approx(1)
    assert shares[1] > shares[0] > shares[2] == 0
    assert not unit_effects.shares_of_effect(outputs, np.full((80, 3), np.nan)).any()


def test_units_whose_gate_a_constant_feature_holds_where_it_is_a_line_are_no_evidence():
    """Others can cancel them; that all tokens have the feature is found by reading a text."""
    arch = dataclasses.replace(ARCH, embed_dim=36)
    leaves = dict(flatten(on_host(InMemory(arch, init_params(arch, jax.random.key(0)))).params))
    for name in leaves:
        if name.endswith(("embed/embedding", "down_proj/kernel", "o_proj/kernel")):
            leaves[name] = np.array(leaves[name])
            leaves[name][..., 35] = 0
    embedding = leaves["embed/embedding"]
    embedding[:, 35] = 1.2 * np.sqrt(35) * embedding[:, :35].std()
    for i in range(3):
        gate = leaves[f"layers/{i}/mlp/gate_proj/kernel"] = np.array(leaves[f"layers/{i}/mlp/gate_proj/kernel"])
        gate *= 3 / np.linalg.norm(gate, axis=0)
        gate[35, 32:], gate[35, :32] = 0, 3.3
    by_text, by_weights = by_text_and_by_weights(arch, leaves)
    assert distinct_units(by_weights, 0).kept.min() < 8
    kept = distinct_units(by_text, 0).kept
    assert kept.min() >= 32
    assert len(kept) > 28


def test_layers_repeat_others_if_gates_or_ups_do():
    """The rows of either can read features besides that nothing writes, and that change nothing."""
    base = on_host(tiny.model(ARCH, 0))
    leaves, rng = dict(flatten(base.params)), np.random.default_rng(0)
    for at, changed in ((1, "up_proj"), (2, "gate_proj")):
        leaves |= {
            name.replace("/0/", f"/{at}/"): leaf for name, leaf in leaves.items() if name.startswith("layers/0/")
        }
        kernel = leaves[f"layers/{at}/mlp/{changed}/kernel"]
        leaves[f"layers/{at}/mlp/{changed}/kernel"] = rng.standard_normal(kernel.shape).astype(np.float32)
    assert repeated_layers(InMemory(ARCH, unflatten(leaves))) == [1, 2]
    assert repeated_layers(base) == []


@pytest.mark.slow
def test_units_of_models_without_a_tokenizer_are_no_firm_evidence(family, tmp_path):
    """Which tokens a text has is not known then, nor what units read: nobody is accused or cleared."""
    for name in ("base", "finetune", "independent"):
        shutil.copytree(family.member(name), tmp_path / name, ignore=shutil.ignore_patterns("token*", "special*"))
    found, cleared = (
        tj.trace(tmp_path / "base", tmp_path / name, ("csu", "match_moments", "match_crossfit")).record["verdict"]
        for name in ("finetune", "independent")
    )
    assert found["verdict"] == cleared["verdict"] == "undecided"
    assert "without a tokenizer" in found["meaning"]
    assert found["adjusted_log10_p"] < -6
    assert "units that no text reaches" in cleared["meaning"]
