"""Signatures: what is drawn, what the file holds, and which models one is found in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from benchmarks.descendants import pruned_in_depth, quantised
from benchmarks.forgeries import on_device, on_host, planted, sorted_units, widened
from benchmarks.mixtures import upcycled as make_upcycled
from benchmarks.mixtures import upcycled_arch
from tracing_jax.library import (
    MAX_BYTES,
    Vocabulary,
    compare,
    drawing,
    is_same,
    make_signature,
    read_signature,
    read_suspect,
    to_bytes,
)
from tracing_jax.library.comparison import HEADS, MOMENTS, RESPONSES
from tracing_jax.library.heads import HEAD_FORMS, SampledHeads, forms_on
from tracing_jax.library.readings import moment_readings
from tracing_jax.library.signature import SampledLayer, Signature
from tracing_jax.library.suspect import head_strings_of
from tracing_jax.rewrites import Renaming, draw_rewrites
from tracing_jax.sources import InMemory, MlpsAsLayers, in_memory, rewritten
from tracing_jax.statistics.mlp_rows import mlp_rows
from tracing_jax.tree import map_named

_DEEP = {"num_layers": 4, "layer_ropes": (0,) * 4, "layer_windows": (None,) * 4, "embed_dim": 48, "mlp_dim": 80}
GATED = tiny.llama_mha(**_DEEP)
UNBIASED = dataclasses.replace(tiny.qwen3_gqa(**_DEEP), qk_norm=None)
GATELESS = tiny.gpt2(**_DEEP | {"layer_ropes": ()})
_ARCHS = pytest.mark.parametrize("arch", [GATED, pytest.param(GATELESS, marks=pytest.mark.slow)])
STRINGS = {f"token {i}": i for i in range(61)}
VOCABULARY = Vocabulary(STRINGS, known=True)


def signature_of(model, seed=0, vocabulary=VOCABULARY):
    return make_signature(model, vocabulary, model_id=f"model {seed}", files={"a.safetensors": f"{seed:064x}"})


def match_of(signature, model, vocabulary=VOCABULARY):
    return compare(signature, read_suspect(model, vocabulary, signature.tokens))


def disguised(model, names, seed=7):
    rewrites = draw_rewrites(names, jax.random.key(seed), model.arch)
    found = in_memory(rewritten(model, rewrites))
    hidden = InMemory(found.arch, jax.tree.map(jnp.asarray, found.params))
    if not any(isinstance(rewrite, Renaming) for rewrite in rewrites):
        return hidden, VOCABULARY
    new_ids = Renaming.composed(rewrites)
    return hidden, Vocabulary({string: int(new_ids[i]) for string, i in STRINGS.items()}, known=True)


def base_of(arch):
    return tiny.model(arch, 0)


def finetuned(base, share=0.1):
    return InMemory(base.arch, tiny.noisy(base.params, share))


@pytest.fixture(scope="module")
def signatures():
    return {True: signature_of(base_of(GATED)), False: signature_of(base_of(GATELESS))}


_REWRITES = {
    GATED: ("all", "permute", "rotate", "gains", "units", "values", "queries", "pad"),
    GATELESS: ("all", "permute", "gains", "values", "queries", "pad"),
}
_CASES = [pytest.param(arch, name, id=f"{arch.family}-{name}", marks=() if (arch, name) == (GATED, "all") else
                       pytest.mark.slow) for arch, names in _REWRITES.items() for name in names]  # fmt: skip


@pytest.mark.parametrize(("arch", "name"), _CASES)
def test_a_disguise_leaves_the_agreement_as_it_is(arch, name, signatures):
    plain = match_of(signatures[arch.gated], finetuned(base_of(arch)))
    hidden = match_of(signatures[arch.gated], *disguised(finetuned(base_of(arch)), name))
    for test, found in plain.tests.items():
        for given, other in zip(found.agreeing, hidden.tests[test].agreeing, strict=True):
            assert abs(given - other) <= (0 if test == HEADS else 4), test
    assert hidden.firm_log10_p < -20


def narrowed(model, seed=0):
    """Returns the model with three quarters of the units of each MLP."""
    F = model.arch.mlp_dim
    kept = np.sort(np.random.default_rng(seed).permutation(F)[: 3 * F // 4])

    def cut(name, leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size == F]
        return jnp.take(leaf, kept, axis=axes[0]) if "/mlp/" in name and axes else leaf

    return InMemory(dataclasses.replace(model.arch, mlp_dim=len(kept)), map_named(cut, model.params))


@_ARCHS
def test_relatives_are_found(arch, signatures):
    tuned = finetuned(base_of(arch))
    for relative in (
        tuned,
        quantised(4)(tuned, 0).model,
        narrowed(tuned),
        pruned_in_depth(tuned, 0).model,
    ):
        assert match_of(signatures[arch.gated], relative).firm_log10_p < -10


def test_a_relative_with_other_embeddings_is_found_by_moments_alone(signatures):
    base, other = base_of(GATED), tiny.model(GATED, 1)
    swapped = InMemory(GATED, finetuned(base).params | {part: other.params[part] for part in ("embed", "head")})
    found = match_of(signatures[True], swapped)
    assert found.tests[RESPONSES].log10_p > -3
    assert found.tests[MOMENTS].firm_log10_p < -10
    without_tokens = match_of(signatures[True], swapped, Vocabulary({"another": 0}, known=True))
    assert without_tokens.tests.keys() == {MOMENTS}
    assert without_tokens.not_tested[HEADS].startswith("0 of the 24 token strings")
    assert without_tokens.firm_log10_p < -10


def test_layers_of_a_spliced_model_are_found_where_they_are(signatures):
    base, other = finetuned(base_of(GATED)), tiny.model(GATED, 5)
    layers = {str(i): (base if i < 2 else other).layer(i) for i in range(4)}
    found = match_of(signatures[True], InMemory(GATED, base.params | {"layers": layers})).tests[RESPONSES]
    assert [place[:2] for place in found.places] == [(0, 0)]
    assert found.agreeing[0] > 50 > 10 > max(found.agreeing[1:])


@pytest.fixture(scope="module")
def upcycled():
    """A fine-tuned copy of the base whose MLPs are now three experts, and nothing else of that shape is."""
    arch = upcycled_arch(GATED, tiny.mixtral())
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], finetuned(base_of(GATED)).params)
    return InMemory(arch, jax.tree.map(lambda leaf: leaf[0], make_upcycled(stacked, arch, seed=3)))


def test_every_expert_of_an_upcycled_model_has_the_moments_of_the_mlp_that_it_was(upcycled):
    tuned = finetuned(base_of(GATED))
    dense, mlps = moment_readings(tuned), MlpsAsLayers(upcycled)
    read = moment_readings(mlps)
    for i in (0, 4, len(mlps.places) - 1):
        for kind, (rows, live) in read(i).items():
            expected = dense(mlps.places[i][0])[kind]
            np.testing.assert_allclose(rows, expected[0], atol=1e-4)
            np.testing.assert_array_equal(live, expected[1])


@pytest.mark.slow
def test_models_with_experts_are_found_by_moments(signatures, upcycled):
    """An upcycled model by the dense signature and the reverse, with other embeddings in another order."""
    hidden, _ = disguised(upcycled, "permute")
    other = tiny.model(GATED, 1)
    swapped = InMemory(upcycled.arch, hidden.params | {part: other.params[part] for part in ("embed", "head")})
    found = match_of(signatures[True], swapped)
    assert found.tests[RESPONSES].log10_p > -3
    assert found.tests[MOMENTS].firm_log10_p < -10
    of_experts = signature_of(upcycled)
    assert all(layer.moments for layer in of_experts.layers)
    assert match_of(of_experts, finetuned(base_of(GATED), 0.15)).tests[MOMENTS].firm_log10_p < -10
    for seed in (4, 5):
        for arch in (GATED, upcycled.arch):
            assert match_of(of_experts, tiny.model(arch, seed)).log10_p > -3


@_ARCHS
def test_strangers_are_not_found(arch, signatures):
    for seed in range(1, 4):
        assert match_of(signatures[arch.gated], tiny.model(arch, seed)).log10_p > -3


@pytest.mark.slow
def test_units_that_are_planted_copied_or_ordered_make_no_alarm():
    """What could be done to an unrelated model that keeps its function, to look like the model of a signature."""
    for forge in (planted(20), planted(20, paired=True), sorted_units("gate_proj"), widened(4)):
        pair = on_host(tiny.model(UNBIASED, 0)), on_host(tiny.model(UNBIASED, 1))
        target, forged = (on_device(model) for model in forge(*pair, np.random.default_rng(0)))
        assert match_of(signature_of(target), forged).log10_p > -3


def test_gated_and_gateless_models_are_not_compared(signatures):
    suspect = read_suspect(base_of(GATELESS), VOCABULARY, list(STRINGS))
    found = compare(dataclasses.replace(signatures[True], heads=()), suspect)
    assert compare(signatures[True], suspect).tests.keys() == {HEADS}
    assert not found.tests
    assert found.log10_p is None
    assert set(found.not_tested) == {RESPONSES, MOMENTS, HEADS}


@pytest.mark.parametrize("arch", [GATED, GATELESS])
def test_bytes_are_the_same_each_time_and_can_be_read_back(arch, tmp_path, signatures):
    written = to_bytes(signatures[arch.gated])
    assert written == to_bytes(signature_of(base_of(arch)))
    (tmp_path / "x").write_bytes(written)
    found = read_signature(tmp_path / "x")
    assert to_bytes(found) == written
    assert all(layer.moments for layer in found.layers)


def test_the_largest_signature_fits():
    """Nothing in it grows with the model: this has as many units, tokens, moments and files as there can be."""
    rng, units, M = np.random.default_rng(0), drawing.MOMENT_UNITS, 35
    kinds = ("gate", "up")
    layers = tuple(
        SampledLayer(
            i,
            np.arange(drawing.UNITS, dtype=np.int32),
            {kind: rng.integers(-127, 128, (drawing.UNITS, drawing.TOKENS)).astype(np.int8) for kind in kinds},
            {kind: rng.integers(-127, 128, (units, M)).astype(np.int8) for kind in kinds},
            {kind: np.eye(M, dtype=np.float16) for kind in kinds},
        )
        for i in (13, 40, 66)
    )
    files = {f"model-{i:05d}-of-00016.safetensors": f"{i:064x}" for i in range(16)}
    facts = dict(signature_of(base_of(GATED)).facts) | {"model": "o" * 200, "files": files, "revision": "0" * 40}
    strings = tuple(f"{i:0{drawing.MAX_STRING}d}" for i in range(drawing.TOKENS))
    T2 = drawing.HEAD_TOKENS**2
    heads = tuple(
        SampledHeads(
            i,
            np.arange(drawing.HEADS, dtype=np.int32),
            {form: rng.integers(-127, 128, (drawing.HEADS, T2)).astype(np.int8) for form in HEAD_FORMS},
        )
        for i in (13, 40, 66)
    )
    facts["head_layers"] = [1013, 1040, 1066]
    assert 240_000 < len(to_bytes(Signature(facts, strings, layers, heads))) <= MAX_BYTES == 256 * 1024


def test_what_is_drawn_follows_from_the_files_alone():
    keys = [drawing.drawing_key(drawing.model_digest({"a": f"{i:064x}"})) for i in range(2)]
    assert drawing.model_digest({"a": "1", "b": "2"}) == drawing.model_digest({"x": "2", "y": "1"})
    kept = np.arange(100, 1100)
    drawn = [drawing.drawn_units(kept, key, 3, 64) for key in keys]
    assert len(set(drawn[0].tolist())) == 64
    assert set(drawn[0].tolist()) != set(drawn[1].tolist())
    np.testing.assert_array_equal(drawing.drawn_units(kept, keys[0], 3, 128)[:64], drawn[0])
    assert [drawing.sampled_layers(n) for n in (1, 2, 4, 32)] == [[0], [0, 1], [0, 2, 3], [5, 16, 26]]


def test_samples_of_overlapping_vocabularies_overlap():
    small, large = ({f"token {i}": i for i in range(n)} for n in (2000, 4000))
    shared = set(drawing.sampled_tokens(small, 400)) & set(drawing.sampled_tokens(large, 400))
    assert 120 < len(shared) < 280  # half of the larger one's are in the smaller one, and begin its list
    assert drawing.sampled_tokens(dict(reversed(small.items())), 400) == drawing.sampled_tokens(small, 400)
    assert not drawing.sampled_tokens({"x" * 25: 0}, 10)


def test_rows_are_sampled_at_fewer_tokens_than_solve_for_them(signatures):
    for width in (1, 2, 64, 1024, 8192):
        assert drawing.most_tokens(width) <= max(1, width / 2)
    assert all(found.shape[1] <= 24 for layer in signatures[True].layers for found in layer.readings.values())


def test_whoever_has_the_embeddings_solves_for_no_more_of_a_row_than_its_share_of_tokens(signatures):
    """The least-squares solution for a row from its responses: the documentation says how near it comes."""
    model, found = base_of(GATED), signatures[True]
    ids = [STRINGS[string] for string in found.tokens]
    tokens = np.asarray(model.embed()["embedding"], np.float64)[ids]
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    solve = np.linalg.pinv(tokens - tokens.mean(axis=0), rcond=1e-3)
    shares = []
    for layer in found.layers:
        rows = np.asarray(mlp_rows(model.layer(layer.layer), GATED)["up"], np.float64)[layer.units]
        solved = layer.readings["up"].astype(float) @ solve.T
        cosines = (solved * rows).sum(axis=1) / np.linalg.norm(solved, axis=1) / np.linalg.norm(rows, axis=1)
        shares.append(np.square(cosines).mean())
    expected = (len(ids) - 1) / GATED.embed_dim
    assert expected <= 0.5
    np.testing.assert_allclose(np.mean(shares), expected, atol=0.05)


def test_models_without_tokenizers_are_compared_row_by_row(signatures):
    unknown = Vocabulary({f"\0row {i} of 61": i for i in range(61)}, known=False)
    signature = signature_of(base_of(GATED), vocabulary=unknown)
    assert match_of(signature, finetuned(base_of(GATED))).tests[RESPONSES].firm_log10_p < -20
    other = dataclasses.replace(GATED, vocab_size=60)
    assert RESPONSES in match_of(signature, tiny.model(other, 3), Vocabulary({"a": 0}, known=True)).not_tested


MANY_HEADS = dataclasses.replace(GATED, num_kv_heads=16, embed_dim=64)
PLANTABLE = dataclasses.replace(MANY_HEADS, head_dim=24, qkv_bias=False, o_bias=False)


def with_other_mlps(model, seed):
    """Returns a model with the attention and embeddings of one, and the MLPs of an unrelated one of its shape."""
    other = tiny.model(model.arch, seed).params["layers"]
    layers = {i: layer | {"mlp": other[i]["mlp"]} for i, layer in model.params["layers"].items()}
    return InMemory(model.arch, model.params | {"layers": layers})


@pytest.fixture(scope="module")
def many_heads():
    return signature_of(base_of(MANY_HEADS))


@pytest.mark.parametrize("q_group", [1, 4])
def test_a_relative_all_of_whose_mlps_were_replaced_is_found_by_its_heads(q_group, many_heads):
    """As it is, with every disguise at once, and without one of its layers; the layers are found where they are."""
    arch = dataclasses.replace(MANY_HEADS, num_kv_heads=16 // q_group, q_group=q_group)
    signature = many_heads if q_group == 1 else signature_of(base_of(arch))
    replaced = with_other_mlps(finetuned(base_of(arch)), 9)
    shortened = pruned_in_depth(replaced, 1).model  # layer 2 is gone
    for relative, places in (
        ((replaced,), [(0, 0), (2, 2), (3, 3)]),
        (disguised(replaced, "all"), None),
        ((shortened,), [(0, 0), None, (3, 2)]),
    ):
        found = match_of(signature, *relative)
        assert max(found.tests[name].log10_p for name in (RESPONSES, MOMENTS)) > -3
        assert found.tests[HEADS].log10_p < -6
        assert found.log10_p < -5
        assert found.firm_log10_p < -3  # and where three times the allowance agree by convergence, in each layer
        expected = [place for place in places or [] if place is not None]
        assert set(expected) <= {place[:2] for place in found.tests[HEADS].places}


def test_heads_of_strangers_are_not_found(many_heads):
    for q_group in (1, 4):
        arch = dataclasses.replace(MANY_HEADS, num_kv_heads=16 // q_group, q_group=q_group)
        signature = many_heads if q_group == 1 else signature_of(base_of(arch))
        for seed in range(1, 5):
            found = match_of(signature, tiny.model(arch, seed)).tests[HEADS]
            assert found.log10_p > -2
            assert not found.places


def test_agreement_is_firm_if_three_times_the_allowance_do_not_explain_the_best_of_many_layers(many_heads):
    """Not if it is more than three times the allowance: the best of many layers of independent models is, too."""
    strings = many_heads.tokens[: drawing.HEAD_TOKENS]
    stranger = read_suspect(tiny.model(MANY_HEADS, 1), VOCABULARY, many_heads.tokens, head_strings=strings)

    def with_heads(count):
        heads = dict(stranger.heads)
        for sampled in many_heads.heads:
            own = {name: np.concatenate([forms[:count], heads[sampled.layer][name][count:]])
                   for name, forms in sampled.forms.items()}  # fmt: skip
            heads[sampled.layer] = own
        return compare(many_heads, dataclasses.replace(stranger, heads=heads)).tests[HEADS]

    some, all_of_them = with_heads(7), with_heads(16)
    assert sum(some.agreeing) > 3 * 0.05 * 48
    assert some.log10_p < -3 < some.firm_log10_p
    assert all_of_them.firm_log10_p < -10


def test_heads_that_a_signature_holds_several_times_are_counted_once(many_heads):
    """As of a looped model, or made up: three layers of the same heads in other orders, or half as many twice."""
    model, first = base_of(MANY_HEADS), many_heads.heads[0]
    rng = np.random.default_rng(0)

    def repeated(layer, order):
        return SampledHeads(layer, first.heads, {name: forms[order] for name, forms in first.forms.items()})

    once = match_of(dataclasses.replace(many_heads, heads=(first,)), model).tests[HEADS]
    looped = tuple(repeated(i, rng.permutation(16)) for i in (0, 2, 3))
    found = match_of(dataclasses.replace(many_heads, heads=looped), model).tests[HEADS]
    assert found.units == once.units == (16,)
    assert found.log10_p == pytest.approx(once.log10_p, abs=0.5)  # chance in other layers by another order
    twice = (repeated(0, np.tile(np.arange(8), 2)),)
    assert match_of(dataclasses.replace(many_heads, heads=twice), model).tests[HEADS].units == (8,)
    equal = (repeated(0, np.zeros(16, int)),)
    assert HEADS in match_of(dataclasses.replace(many_heads, heads=equal), model).not_tested
    assert match_of(many_heads, model).tests[HEADS].units == (16, 16, 16)


def test_whether_heads_are_tested_does_not_depend_on_other_signatures_of_a_library():
    """Of a small vocabulary whose strings have large hashes, beside many whose strings have smaller ones."""
    arch = dataclasses.replace(MANY_HEADS, vocab_size=400)
    whole = Vocabulary({f"token {i}": i for i in range(400)}, known=True)
    strings = drawing.sampled_tokens(whole.ids, 400)
    own = Vocabulary({string: whole.ids[string] for string in strings[-32:]}, known=True)
    base = tiny.model(arch, 0)
    small = signature_of(base, vocabulary=own)
    others = [dataclasses.replace(small, tokens=tuple(strings[i : i + 32])) for i in range(0, 352, 32)]
    for library in ([small], [small, *others]):
        tokens = sorted({string for signature in library for string in signature.tokens})
        suspect = read_suspect(base, whole, tokens, head_strings=head_strings_of(library))
        assert compare(small, suspect).tests[HEADS].agreeing == (16, 16, 16)


def planted_layers(model, signature, size, of_mlps=1e-7):
    """Returns the model with three layers between its own that have the heads of a signature, times so much.

    Someone who has the published forms alone solves them for queries, keys, values and outputs.
    """
    ids = [STRINGS[string] for string in signature.tokens[: drawing.HEAD_TOKENS]]
    tokens = np.asarray(model.embed()["embedding"], np.float64)[ids]
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    solve = np.linalg.pinv(tokens - tokens.mean(axis=0))
    arch, layers = model.arch, model.params["layers"]
    T, D, K, H = len(ids), arch.embed_dim, arch.num_kv_heads, arch.head_dim

    def solved(forms):
        left, sizes, right = np.linalg.svd(forms.reshape(len(forms), T, T).astype(float) / 127)
        root = np.sqrt(sizes)[:, None, :H]
        sides = (solve @ (left[:, :, :H] * root), solve @ (right.transpose(0, 2, 1)[:, :, :H] * root))
        return [np.pad(side, ((0, K - len(side)), (0, 0), (0, 0))) for side in sides]

    def planted(found, like):
        (q, k), (o, v) = (solved(found.forms[name]) for name in HEAD_FORMS)
        shapes = {"q": q.transpose(1, 0, 2)[:, :, None], "k": k.transpose(1, 0, 2), "v": v.transpose(1, 0, 2),
                  "o": size * o.transpose(0, 2, 1)[:, None]}  # fmt: skip
        attn = {f"{name}_proj": {"kernel": jnp.asarray(kernel, jnp.float32)} for name, kernel in shapes.items()}
        attn |= {name: leaves for name, leaves in like["attn"].items() if name not in attn}
        mlp = jax.tree.map(jnp.asarray, like["mlp"])
        mlp["down_proj"] = jax.tree.map(lambda leaf: of_mlps * leaf, mlp["down_proj"])
        return like | {"attn": attn, "mlp": mlp, "attn_norm": {"scale": jnp.ones(D)}}

    added = [planted(found, layers[str(i)]) for i, found in enumerate(signature.heads)]
    order = [layer for pair in zip((layers[str(i)] for i in range(4)), [*added, None]) for layer in pair if layer]
    arch = dataclasses.replace(arch, num_layers=7, layer_ropes=(0,) * 7, layer_windows=(None,) * 7)
    return InMemory(arch, model.params | {"layers": {str(i): layer for i, layer in enumerate(order)}})


@pytest.mark.parametrize("screen", [False, True])
def test_heads_that_are_solved_from_a_signature_into_layers_that_do_nothing_are_no_evidence(screen):
    """They would agree, were the layers not left out; a screen, which sees these layers alone, calls nobody related."""
    target = signature_of(base_of(PLANTABLE))
    stranger = tiny.model(PLANTABLE, 1)
    strings = target.tokens
    loud, silent = (
        read_suspect(planted_layers(stranger, target, size), VOCABULARY, strings, screen=screen) for size in (1, 1e-7)
    )
    seen = compare(target, loud).tests[HEADS]
    assert seen.log10_p < -6
    assert (seen.firm_log10_p == 0) == screen
    found = compare(target, silent)
    assert HEADS in found.not_tested if screen else found.tests[HEADS].log10_p > -1
    assert set(silent.heads) == (set() if screen else {0, 2, 4, 6})
    own = signature_of(planted_layers(stranger, target, 1e-7, 1.0))
    assert not {found.layer for found in own.heads} & {1, 3, 5}


def test_forms_of_heads_on_some_tokens_follow_from_those_on_all(many_heads):
    """A suspect that lacks some of the strings is compared by the others."""
    model, tokens = base_of(MANY_HEADS), many_heads.tokens[:24]
    some = {string: STRINGS[string] for string in tokens[::2]}
    suspect = read_suspect(model, Vocabulary(some, known=True), many_heads.tokens)
    assert set(suspect.head_columns) == set(some)
    columns = [suspect.head_columns[string] for string in tokens[::2]]
    for sampled in many_heads.heads:
        for name, forms in sampled.forms.items():
            whole = forms_on(forms, list(range(0, 24, 2)))
            own = forms_on(suspect.heads[sampled.layer][name], columns)[sampled.heads]
            assert np.all((whole * own).sum(axis=1) > 0.995)


def test_heads_that_write_nothing_are_not_sampled():
    model = base_of(GATED)
    layers = dict(model.params["layers"])
    attn = dict(layers["2"]["attn"])
    attn["o_proj"] = {"kernel": jnp.asarray(attn["o_proj"]["kernel"]).at[1].set(0.0)}
    layers["2"] = layers["2"] | {"attn": attn}
    found = signature_of(InMemory(GATED, model.params | {"layers": layers}))
    assert [sampled.layer for sampled in found.heads] == [0, 2, 3]
    assert sorted(found.heads[1].heads.tolist()) == [0, 2, 3, 4, 5]


def earlier(signature):
    """Returns a signature as the first version of the format had it: no heads."""
    shape = {name: value for name, value in signature.facts["shape"].items() if name not in ("num_kv_heads", "q_group")}
    facts = dict(signature.facts) | {"format": 1, "rule": drawing.EARLIER_RULE, "shape": shape}
    del facts["head_layers"]
    return dataclasses.replace(signature, facts=facts, heads=())


def test_files_of_the_first_version_are_read(tmp_path, signatures):
    (tmp_path / "x").write_bytes(to_bytes(earlier(signatures[True])))
    found = read_signature(tmp_path / "x")
    match = match_of(found, finetuned(base_of(GATED)))
    assert match.firm_log10_p < -20
    assert match.not_tested[HEADS].endswith("made by an earlier version")
    assert is_same(found, signatures[True])
    assert is_same(signatures[True], found)
    assert not is_same(earlier(signature_of(tiny.model(GATED, 1))), signatures[True])


def test_of_two_versions_the_tokens_that_both_have_are_compared(signatures):
    """Rows are scaled by their largest response, which may be to a token that one of both lacks."""

    def with_largest(rows):
        """Returns rows of which the largest response, to one more token, is twice the others."""
        return np.pad(np.round(rows / 2).astype(np.int8), ((0, 0), (0, 1)), constant_values=127)

    found = earlier(signatures[True])
    layers = [
        dataclasses.replace(layer, readings={name: with_largest(rows) for name, rows in layer.readings.items()})
        for layer in found.layers
    ]
    longer = dataclasses.replace(found, tokens=(*found.tokens, "one more"), layers=tuple(layers))
    assert is_same(longer, signatures[True])
    other = dataclasses.replace(longer, tokens=("one more", *found.tokens))
    assert not is_same(other, signatures[True])


def test_damaged_files_are_refused(tmp_path, signatures):
    written = to_bytes(signatures[True])
    file = tmp_path / "damaged"
    for content in (b"", b"\0" * 100, written[:-1], written[:5000], written + b"\0" * MAX_BYTES):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a signature"):
            read_signature(file)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(100):  # whatever the bytes, it is refused or read
        content = bytearray(written)
        for at in rng.integers(0, 3000, 3):
            content[at] = rng.integers(256)
        file.write_bytes(content)
        try:
            read_signature(file)
        except ValueError:
            refused += 1
    assert refused > 50
    with pytest.raises(OSError, match="No such file"):
        read_signature(tmp_path / "missing")


def _changed(signature, **facts):
    """Returns the file of a signature with other facts in its header; None takes one out."""
    found = {name: value for name, value in (dict(signature.facts) | facts).items() if value is not ...}
    return to_bytes(dataclasses.replace(signature, facts=found))


def _with(signature, **changes):
    """Returns the file of a signature whose tensors of these names have other content; of every layer, or of none."""
    written = to_bytes(signature)
    tensors, facts = safetensors.numpy.load(written), json.dumps(dict(signature.facts))
    for part, change in changes.items():
        for name in [name for name in tensors if name.rpartition("/")[2].replace(" ", "_").startswith(part)]:
            tensors[name] = change(tensors[name])
    return safetensors.numpy.save(tensors, {"tracing_jax_signature": facts})


_NAN = np.float16(np.nan)
_HOSTILE = {
    "other format": (lambda s: _changed(s, format=3), "expected format 2 .* found 3"),
    "other rule": (lambda s: _changed(s, rule="mine"), "found 2 and mine"),
    "rule of another format": (lambda s: _changed(s, format=1), "expected format 2 .* found 1"),
    "no model": (lambda s: _changed(s, model=...), "model is None"),
    "escape codes": (lambda s: _changed(s, model="\x1b[2Ja"), "expected printable"),
    "endless name": (lambda s: _changed(s, model="a" * 1000), "model is 'aaa"),
    "no hash": (lambda s: _changed(s, digest="x" * 64), "SHA-256"),
    "hash of other files": (lambda s: _changed(s, digest="0" * 64), "not that of the weight files"),
    "many files": (lambda s: _changed(s, files={f"{i}": "0" * 64 for i in range(17)}), "at most 16 weight files"),
    "other readings": (lambda s: _changed(s, readings=["gate", "down"]), "readings are"),
    "one reading": (lambda s: _changed(s, readings="gate"), "readings are"),
    "no gate": (lambda s: _changed(s, readings=["up", "effect"]), "other MLPs"),
    "shape of text": (lambda s: _changed(s, shape={"embed_dim": "48"}), "shape"),
    "negative width": (lambda s: _changed(s, shape=dict(s.facts["shape"]) | {"embed_dim": -1}), "shape"),
    "endless width": (lambda s: _changed(s, shape=dict(s.facts["shape"]) | {"embed_dim": 10**400}), "shape"),
    "small width": (lambda s: _changed(s, shape=dict(s.facts["shape"]) | {"embed_dim": 8}), "4 at most"),
    "layer twice": (lambda s: _changed(s, layers=[0, 0, 3]), "the rule samples"),
    "endless layer": (lambda s: _changed(s, layers=[0, 2, 10**30]), "expected 1 to 3 numbers"),
    "other layers": (lambda s: _changed(s, of_layers=5), "the rule samples"),
    "layers of text": (lambda s: _changed(s, layers="023"), "expected 1 to 3 numbers"),
    "units in floats": (lambda s: _with(s, units=lambda u: u * 1.0), "expected int32"),
    "one unit": (lambda s: _with(s, units=lambda u: u[:1]), "different units"),
    "a unit twice": (lambda s: _with(s, units=lambda u: np.where(u == u[0], u[1], u)), "different units"),
    "negative units": (lambda s: _with(s, units=lambda u: -u - 1), "different units"),
    "NaN responses": (lambda s: _with(s, gate=lambda r: np.full(r.shape, np.nan, np.float32)), "found float32"),
    "wide responses": (lambda s: _with(s, gate=lambda r: np.concatenate([r, r], 1)), "expected int8 of shape"),
    "a unit less": (lambda s: _with(s, gate=lambda r: r[1:]), "expected int8 of shape"),
    "flat moments": (lambda s: _with(s, moments=lambda m: m[:, :3]), "expected int8 of shape"),
    "few moments": (lambda s: _with(s, moments=lambda m: m[:1]), "1 rows, expected"),
    "moments of one number": (lambda s: _with(s, moments=lambda m: m[0, :1]), "damaged|expected"),
    "NaN covariance": (lambda s: _with(s, covariance=lambda c: c * _NAN), "expected correlations"),
    "huge covariance": (lambda s: _with(s, covariance=lambda c: c * np.float16(6e4)), "expected correlations"),
    "negative covariance": (lambda s: _with(s, covariance=lambda c: -c), "expected correlations"),
    "lopsided covariance": (lambda s: _with(s, covariance=lambda c: np.triu(c, 1) + c / 2), "expected correlations"),
    "small covariance": (lambda s: _with(s, covariance=lambda c: c[:0]), "expected float16 of shape"),
    "a token twice": (lambda s: to_bytes(dataclasses.replace(s, tokens=("a", *s.tokens[1:-1], "a"))), "twice"),
    "a token less": (lambda s: to_bytes(dataclasses.replace(s, tokens=s.tokens[1:])), "expected int8 of shape"),
    "a long token": (lambda s: to_bytes(dataclasses.replace(s, tokens=("a" * 25, *s.tokens[1:]))), "24 bytes"),
    "more layers": (lambda s: to_bytes(dataclasses.replace(
        s, layers=(*s.layers, dataclasses.replace(s.layers[0], layer=1)))), "do not belong"),
    "no layers of heads": (lambda s: _changed(s, head_layers=...), "head_layers are None"),
    "layers of heads that are not there": (lambda s: _changed(s, head_layers=[0, 2, 9]), "not layers of the model"),
    "layers of heads in disorder": (lambda s: _changed(s, head_layers=[2, 0, 3]), "increasing order"),
    "a layer of heads less": (lambda s: _changed(s, head_layers=[0, 2]), "do not belong"),
    "no heads to sample": (lambda s: _changed(s, shape=dict(s.facts["shape"]) | {"q_group": 0}), "0 query heads"),
    "endless heads": (lambda s: _changed(s, shape=dict(s.facts["shape"]) | {"q_group": 10**6}), "query heads has none"),
    "fewer heads than sampled": (lambda s: _changed(
        s, shape=dict(s.facts["shape"]) | {"num_kv_heads": 5}), "different heads of 5"),
    "a head twice": (lambda s: _with(s, heads=lambda h: h * 0), "different heads"),
    "heads in floats": (lambda s: _with(s, heads=lambda h: h * 1.0), "expected int32"),
    "small forms": (lambda s: _with(s, output=lambda f: f[:, :4]), "expected int8 of shape"),
    "NaN forms": (lambda s: _with(s, attention=lambda f: f * np.float32("nan")), "found float32"),
    "fewer layers": (lambda s: to_bytes(dataclasses.replace(s, layers=s.layers[:2])), "lacks the tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", _HOSTILE)
def test_whatever_is_wrong_in_a_signature_is_named(name, tmp_path, signatures):
    change, message = _HOSTILE[name]
    file = tmp_path / "hostile.signature.safetensors"
    file.write_bytes(change(signatures[True]))
    with pytest.raises(ValueError, match=message) as error:
        read_signature(file)
    assert str(error.value).startswith(f"{file}: not a signature of `tracing-jax signature`: ")
    assert len(str(error.value)) < 700
    assert str(error.value).isprintable()


def test_other_safetensors_are_no_signatures(tmp_path):
    deep = json.dumps({"__metadata__": {"tracing_jax_signature": "[" * 9000}}).encode()
    for content in (
        safetensors.numpy.save({"a": np.zeros(3)}),
        safetensors.numpy.save({"a": np.zeros(3)}, {"tracing_jax_signature": "[]"}),
        len(deep).to_bytes(8, "little") + deep,
        (2**60).to_bytes(8, "little") + deep,
    ):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match=r"header|cut off"):
            read_signature(tmp_path / "other")
