"""Shares of merges: against least squares and jackknife done by hand, on merges made as mergekit makes them."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import tracing_jax.merges.models as merge_models
import tracing_jax.merges.products as merge_products
from benchmarks import siblings as merging
from tests import tiny
from tests.parity_cases import CASES
from tracing_jax.checkpoint import CheckpointError, open_checkpoint
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.cli import main
from tracing_jax.merges import (
    MergeError,
    MergeModels,
    estimate,
    grouped_shares,
    merge_report,
    opened_models,
    read_sums,
    shares,
)
from tracing_jax.merges.exchange import log_p_of_layer
from tracing_jax.merges.normal_equations import TensorSums, rounded, rounding_variance
from tracing_jax.merges.parent_shares import _of_distinct_layers
from tracing_jax.merges.products import change_of_columns, products
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sources import InMemory, MappedSource, in_memory, rewritten
from tracing_jax.tree import flatten, unflatten

ARCH = dataclasses.replace(tiny.llama_mha(), mlp_dim=48)


def leaves(seed, arch=ARCH):
    return {name: np.asarray(leaf, np.float64) for name, leaf in flatten(tiny.params_of(arch, seed)).items()}


def sibling(origin, seed, size=0.1):
    rng = np.random.default_rng(1000 + seed)
    return {name: leaf + size * rng.normal(size=leaf.shape) for name, leaf in origin.items()}


def model(values, dtype=np.float32, arch=ARCH):
    return InMemory(arch, unflatten({name: jnp.asarray(leaf.astype(dtype)) for name, leaf in values.items()}))


@pytest.fixture(scope="module")
def origin():
    return leaves(0)


@pytest.fixture(scope="module")
def parents(origin):
    return [sibling(origin, seed) for seed in range(3)]


def models_of(child, parents, origin=None, **more):
    named = {name: model(parent) for name, parent in zip("ABCD", parents)}
    return MergeModels(model(child), named, None if origin is None else model(origin), **more)


def report_of(child, parents, origin=None, **more):
    return merge_report(models_of(child, parents, origin, **more))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_shares_are_those_of_least_squares(origin, parents, dtype):
    child = merging.task_arithmetic(origin, parents, [0.5, 0.3, 0.0])
    noisy = {name: leaf + 0.05 * np.random.default_rng(7).normal(size=leaf.shape) for name, leaf in child.items()}
    stored = [{n: leaf.astype(dtype).astype(np.float64) for n, leaf in m.items()} for m in (noisy, origin, *parents)]
    flat = [np.concatenate([leaf.ravel() for leaf in m.values()]) for m in stored]
    y, x = flat[0] - flat[1], np.stack([p - flat[1] for p in flat[2:]], axis=1)
    wanted, rest, *_ = np.linalg.lstsq(x, y, rcond=None)
    models = MergeModels(
        model(noisy, dtype), {n: model(p, dtype) for n, p in zip("ABC", parents)}, model(origin, dtype)
    )
    found = estimate(models, read_sums(models).tensors)
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    assert found.fit.unexplained == pytest.approx(rest[0] / (y @ y), rel=1e-5)


def test_shares_without_the_origin_sum_to_one(parents):
    found = report_of(merging.linear(parents, [3, 1, 1]), parents)
    assert list(found.shares.values()) == pytest.approx([0.6, 0.2, 0.2], abs=1e-5)
    assert set(found.parts.values()) == {"part"}
    assert found.record["unexplained"] < 1e-9
    assert found.sentence.startswith("merged of A (0.600 ± 0.000), B (0.200 ± 0.000) and C (0.200 ± 0.000)")


def test_jackknife_is_that_of_estimates_without_each_block(origin, parents):
    noise = np.random.default_rng(3)
    child = {n: leaf + 0.1 * noise.normal(size=leaf.shape) for n, leaf in merging.linear(parents, [1, 1, 0]).items()}
    models = models_of(child, parents, origin)
    tensor = next(t for t in read_sums(models).tensors if t.place.name == "layers/0/mlp/up_proj/kernel")
    y, *x = (
        (m[tensor.place.name] - origin[tensor.place.name]).astype(np.float32).ravel() for m in (child, *parents)
    )  # float32 of differences, as leaves are
    x, edges = np.stack(x, axis=1), np.concatenate([[0], np.cumsum(tensor.counts)]).astype(int)
    fits = []
    for start, stop in itertools.pairwise(edges):
        kept = np.r_[0:start, stop : len(y)]
        fits.append(np.linalg.lstsq(x[kept], y[kept], rcond=None)[0])
    moved = np.array(fits) - np.linalg.lstsq(x, y, rcond=None)[0]
    found = estimate(models, [tensor])
    np.testing.assert_allclose(found.covariance, (len(fits) - 1) / len(fits) * moved.T @ moved, rtol=0.05)


def test_intervals_cover(origin, parents):
    """Noise of another size in every row, so that entries of a row go together: 95 % within two points."""
    models, place = models_of(origin, parents[:2], origin), None
    place = next(models.places())
    rng, inside = np.random.default_rng(0), []
    for _ in range(400):
        x = rng.normal(size=(2, 64, 32))
        noise = rng.normal(size=(64, 1)) * rng.normal(size=(64, 32)) + rng.normal(size=(64, 1)) * x.mean(0)
        z = np.stack([0.6 * x[0] + 0.3 * x[1] + noise, *x, rng.normal(size=(64, 32))]).reshape(4, 16, -1)
        grams = np.einsum("crn,drn->rcd", z, z)
        found = estimate(models, [TensorSums(place, grams, np.full(16, 128.0), np.zeros((1, 4), np.float32), 0.0)])
        low, high = found.interval()
        inside.append((low < [0.6, 0.3]) & (high > [0.6, 0.3]))
    assert 0.925 < np.mean(inside) < 0.975


def test_intervals_cover_where_few_blocks_carry_most(origin, parents):
    """Differences that fade from row to row, and noise in proportion: few blocks count, and fewer by their noise."""
    models, place = models_of(origin, parents[:2], origin), None
    place = next(models.places())
    rng, inside, by_weight = np.random.default_rng(0), [], []
    for _ in range(300):
        tensors, weights = [], []
        for rows, size in (
            (128, 3 * np.exp(-3 * np.arange(128) / 128)),
            (32, np.full(32, 0.3)),
            (32, np.full(32, 0.3)),
        ):
            x = rng.normal(size=(2, rows, 16)) * size[:, None]
            noise = rng.normal(size=(rows, 16)) * size[:, None] / 3
            z = np.stack([0.6 * x[0] + 0.3 * x[1] + noise, *x, rng.normal(size=(rows, 16))]).reshape(4, 16, -1)
            grams = np.einsum("crn,drn->rcd", z, z)
            weights += [*np.trace(grams[:, 1:3, 1:3], axis1=1, axis2=2)]
            tensors.append(TensorSums(place, grams, np.full(16, float(rows)), np.zeros((1, 4), np.float32), 0.0))
        found = estimate(models, tensors)
        low, high = found.interval()
        inside.append((low < [0.6, 0.3]) & (high > [0.6, 0.3]))
        by_weight.append(found.degrees <= np.sum(weights) ** 2 / np.square(weights).sum() - 1 + 1e-9)
    assert 0.93 < np.mean(inside) < 0.98
    assert all(by_weight)


def test_uninvolved_parents_have_uniform_p_values(origin, parents):
    """Of independent parents, and of siblings where what is left of the child is rounding."""
    rng, log_ps = np.random.default_rng(1), []
    models = models_of(origin, parents[:2], origin)
    for seed in range(300):
        base, a, b = rng.normal(size=(3, 24, 16))
        child = (base + 0.5 * a).astype(np.float32).astype(np.float64)
        log_ps.append(log_p_of_layer(models, [np.stack([child, base, base + a, base + b])], 1, seed))
    for level in (0.3, 0.1, 0.02):
        share = np.mean(np.exp(log_ps) <= level)
        assert share <= level + 3 * np.sqrt(level / 300)


def test_a_model_of_its_own_training_has_no_part_in_a_child_whose_units_were_scaled(origin, parents):
    """What is left of each unit is the origin's: a parent less the origin would have that in the same place."""
    rng, log_ps = np.random.default_rng(1), []
    models = models_of(origin, parents[:2], origin)
    for seed in range(200):
        base, a, own = rng.normal(size=(3, 24, 16))
        child = (base + 0.5 * 0.3 * a) * (1 + 0.1 * rng.normal(size=(24, 1)))
        log_ps.append(log_p_of_layer(models, [np.stack([child, base, base + 0.3 * a, own])], 1, seed))
    for level in (0.3, 0.1, 0.02):
        assert np.mean(np.exp(log_ps) <= level) <= level + 3 * np.sqrt(level / 200)


def test_a_parent_in_another_order_is_not_cleared(origin, parents):
    """Half of each, one of them permuted to fit: it has a part that no test in place sees. What is explained is not."""
    other = leaves(77)
    moved = in_memory(rewritten(model(other), draw_rewrites("permute", jax.random.key(3), ARCH))).params
    child = merging.linear([parents[0], {n: np.asarray(leaf) for n, leaf in flatten(moved).items()}], [1, 1])
    found = report_of(child, [parents[0], other])
    assert found.parts == {"A": "part", "B": "not_testable"}
    assert "in no other model's order" in repr(found)
    assert found.sentence.startswith("A had a part, B cannot be tested")
    explained = report_of(parents[0], [parents[0], other])
    assert explained.parts == {"A": "part", "B": "none"}


def test_parent_without_a_part_is_told_from_one_with_a_small_part(origin, parents):
    found = report_of(merging.task_arithmetic(origin, parents, [0.6, 0.03, 0.0]), parents, origin)
    assert found.parts == {"A": "part", "B": "part", "C": "none"}
    assert found.shares == pytest.approx({"A": 0.6, "B": 0.03, "C": 0.0}, abs=1e-4)


def test_part_that_training_explains_is_reserved(origin, parents):
    """A fine-tune that goes a little way along another one is no merge."""
    own = sibling(origin, 9)
    child = {name: leaf + 0.3 * (parents[0][name] - origin[name]) for name, leaf in own.items()}
    found = report_of(child, parents[:2], origin)
    assert found.parts == {"A": "reserved", "B": "none"}
    assert found.sentence.startswith("no merge is claimed")


def test_copy_of_one_parent_has_one_part(origin, parents):
    found = report_of(parents[0], parents, origin)
    assert found.parts == {"A": "part", "B": "none", "C": "none"}
    assert found.sentence.startswith("of the parents given, A alone has a part")


def test_collinear_parents_are_named_together(origin, parents):
    close = {name: leaf + 0.01 * (parents[1][name] - origin[name]) for name, leaf in parents[0].items()}
    found = report_of(merging.linear([parents[0], close], [1, 1]), [parents[0], close], origin)
    assert set(found.parts.values()) == {"one_of"}
    assert found.sentence.startswith("one of these")


def test_shares_where_parents_are_identical_are_undefined(origin, parents):
    same = {name: origin[name] if "/attn/" in name else leaf for name, leaf in parents[0].items()}
    found = report_of(merging.task_arithmetic(origin, [same, parents[1]], [0.5, 0.5]), [same, parents[1]], origin)
    own = found.record["by_role"]["attention"]
    assert own["shares"]["A"]["share"] is None
    assert own["undefined"] == "A equals the origin here"
    assert any(note.startswith("shares are undefined in") for note in found.record["notes"])


def test_norms_alike_are_no_evidence_of_a_part(origin, parents):
    """All gains are near one, whoever trained them: shares are those of differences."""
    unrelated = leaves(5)
    child = merging.linear(parents[:2], [1, 1])
    found = report_of(child, [*parents[:2], unrelated])
    assert found.parts["C"] == "none"
    assert abs(found.record["by_role"]["norm"]["shares"]["C"]["share"]) < 1e-4


def test_experts_have_shares_of_their_own():
    arch = dataclasses.replace(tiny.mixtral(), mlp_dim=32)
    base = leaves(0, arch)
    a, b = sibling(base, 1), sibling(base, 2)
    child = merging.task_arithmetic(base, [a, b], [0.5, 0.5])
    name = "layers/1/mlp/up_proj/kernel"
    child[name][2] = a[name][2]
    models = MergeModels(model(child, arch=arch), {"A": model(a, arch=arch), "B": model(b, arch=arch)},
                         model(base, arch=arch))  # fmt: skip
    by_expert = grouped_shares(models, read_sums(models).tensors, lambda tensor: str(tensor.place))
    assert by_expert[f"{name}[2]"].values == pytest.approx([1, 0], abs=1e-4)
    assert by_expert[f"{name}[1]"].values == pytest.approx([0.5, 0.5], abs=1e-4)


def test_vocabularies_are_paired_by_token(origin, parents):
    """The child's tokens are in another order, and two are missing."""
    child = merging.linear(parents[:2], [1, 3])
    order = np.random.default_rng(0).permutation(61)[:59]
    child["embed/embedding"] = child["embed/embedding"][order]
    child["head/lm_head/kernel"] = child["head/lm_head/kernel"][:, order]
    smaller = dataclasses.replace(ARCH, vocab_size=59)
    named = {"A": model(parents[0]), "B": model(parents[1])}
    ids = (np.arange(59, dtype=np.int32), order.astype(np.int32), order.astype(np.int32))
    found = merge_report(MergeModels(model(child, arch=smaller), named, tokens=ids))
    assert found.record["by_role"]["embedding"]["shares"]["B"]["share"] == pytest.approx(0.75, abs=1e-5)
    unpaired = merge_report(MergeModels(model(child, arch=smaller), named))
    assert set(unpaired.record["left_out"]) == {"embed/embedding", "head/lm_head/kernel"}


@pytest.mark.parametrize("arch", [ARCH, dataclasses.replace(tiny.mixtral(), mlp_dim=32)], ids=["dense", "experts"])
def test_slices_of_large_leaves_give_the_same_sums(arch, monkeypatch):
    """And the same units; of models that are read whole, too."""
    values = leaves(0, arch)
    first, *others = (model(sibling(values, seed), np.float32, arch) for seed in range(3))
    unsliced = MappedSource(first, lambda tree, _: tree)
    models = MergeModels(model(values, np.float32, arch), dict(zip("ABC", (unsliced, *others))))
    whole = read_sums(models)
    monkeypatch.setattr(merge_models, "SLICE_BYTES", 200)
    sliced = read_sums(models)
    assert [t.place for t in sliced.tensors] == [t.place for t in whole.tensors]
    assert [len(t.grams) for t in sliced.tensors] == [len(t.grams) for t in whole.tensors]
    for own, other in zip(sliced.tensors, whole.tensors):
        np.testing.assert_allclose(own.gram, other.gram, rtol=1e-9, atol=1e-9)
        assert own.counts.sum() == other.counts.sum()
    jax.tree.map(np.testing.assert_array_equal, sliced.units, whole.units)


def test_slices_of_checkpoints_are_read_into_the_same_memory(tmp_path, monkeypatch):
    """And give the sums of whole leaves: what is summed is not overwritten by what is read ahead."""
    case, rng = CASES["qwen3-gqa-untied-default"], np.random.default_rng(0)
    shapes = tensor_shapes(leaf_layouts(case.arch()).values())
    models = []
    for name in "cab":
        (folder := tmp_path / name).mkdir()
        (folder / "config.json").write_text(json.dumps(case.config))
        save_file({n: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for n, shape in shapes.items()},
                  folder / "model.safetensors")  # fmt: skip
        models.append(open_checkpoint(str(folder)))
    models = MergeModels(models[0], dict(zip("AB", models[1:])))
    whole = read_sums(models)
    monkeypatch.setattr(merge_models, "SLICE_BYTES", 300)
    monkeypatch.setattr(merge_products, "_ROW", 4)
    monkeypatch.setattr(merge_products, "_PROGRAM", 4)
    sliced = read_sums(models)
    assert max(piece.slices for place in models.places() for piece in models.pieces(place)) > 4
    for own, other in zip(sliced.tensors, whole.tensors, strict=True):
        np.testing.assert_allclose(own.gram, other.gram, rtol=1e-5, atol=1e-4 * other.counts.sum())
    jax.tree.map(np.testing.assert_array_equal, sliced.units, whole.units)
    monkeypatch.setattr(merge_models, "fits_page_cache", lambda files: False)
    past_cache = read_sums(dataclasses.replace(models))
    for own, other in zip(past_cache.tensors, sliced.tensors, strict=True):
        np.testing.assert_array_equal(own.grams, other.grams)


def test_products_are_those_of_float64():
    """Of every dtype, over a span that is no multiple of a chunk."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        flat = [rng.normal(size=40_001).astype(dtype) for _ in range(4)]
        child, reference, *others = (own[7:40_000].astype(np.float64) for own in flat)
        columns = np.stack([child - reference, *(other - reference for other in others), reference])
        # Differences are rounded to float32 once.
        np.testing.assert_allclose(products(flat, 7, 40_000), columns @ columns.T, rtol=1e-7, atol=1e-4)


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_what_is_left_of_bfloat16_is_exact_to_float32(size):
    """And of parents that are nearly the same: columns are changed before they are summed in float32."""
    rng = np.random.default_rng(0)
    base, a = (rng.normal(size=200_001) for _ in range(2))
    stored = [own.astype(ml_dtypes.bfloat16) for own in (base, base + size * a, base + 1.02 * size * a)]
    ref, one, other = (own.astype(np.float64) for own in stored)
    child = (ref + 0.6 * (one - ref) + 0.3 * (other - ref)).astype(ml_dtypes.bfloat16)
    columns = np.stack([child.astype(np.float64) - ref, one - ref, other - ref, ref])
    change = change_of_columns(columns[:, rng.integers(200_001, size=4096)])
    found = products([child, *stored], 1, 200_000, change)
    exact = columns[:, 1:200_000] @ columns[:, 1:200_000].T
    shares, rests = zip(
        *((np.linalg.solve(g[1:3, 1:3], g[1:3, 0]), np.linalg.inv(g[:3, :3])[0, 0]) for g in (found, exact))
    )
    np.testing.assert_allclose(shares[0], shares[1], atol=1e-5)
    assert rests[0] == pytest.approx(rests[1], rel=1e-5)
    sizes = np.sqrt(np.diag(exact))
    np.testing.assert_allclose(found / np.outer(sizes, sizes), exact / np.outer(sizes, sizes), atol=1e-5)
    with_copy = products([stored[1], *stored], 0, 200_001, change_of_columns(np.stack([one - ref, *columns[1:]])))
    assert with_copy[0, 0] == pytest.approx(with_copy[0, 1], rel=1e-12)


@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (0, 2, 62, 34), (1, 0, 7, 64)])
@pytest.mark.parametrize("size", [65_599, 65_600, 65_601, 131_136])
def test_products_do_not_depend_on_where_models_lie_in_memory(offsets, size):
    """Offsets are in bytes from an aligned address; sizes are around those from which XLA sums."""
    rng, start = np.random.default_rng(0), 5
    flat = []
    for offset in offsets:
        memory = np.zeros(2 * (size + 99), np.uint8)
        first = -memory.ctypes.data % 64 + offset
        flat.append(memory[first : first + 2 * (start + size)].view(ml_dtypes.bfloat16))
        flat[-1][:] = rng.normal(size=start + size)
    child, reference, *others = (own[start:].astype(np.float64) for own in flat)
    columns = np.stack([child - reference, *(other - reference for other in others), reference])
    change = change_of_columns(columns[:, :4096])
    exact = columns @ columns.T
    np.testing.assert_allclose(
        products(flat, start, start + size, change), exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max()
    )


def test_weights_that_are_no_numbers_are_refused(origin, parents, tmp_path):
    name = "layers/1/mlp/up_proj/kernel"
    broken = {**parents[0], name: np.full_like(parents[0][name], np.nan)}
    with pytest.raises(MergeError, match="layers/1/mlp/up_proj/kernel: NaN or infinite weights"):
        report_of(origin, [broken, parents[1]])
    case = CASES["qwen3-gqa-untied-default"]
    shapes = tensor_shapes(leaf_layouts(case.arch()).values())
    for size in (1.0, 2.0, np.inf):
        (folder := tmp_path / str(size)).mkdir()
        (folder / "config.json").write_text(json.dumps(case.config))
        tensors = {name: case.weight(name, shape) for name, shape in shapes.items()}
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], size)
        save_file(tensors, folder / "model.safetensors")
    child, base, parent = (open_checkpoint(str(tmp_path / str(size))) for size in (1.0, 2.0, np.inf))
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in model\.norm\.weight"):
        merge_report(opened_models(child, {"a": parent}, base))


def test_rounding_variance_is_that_of_rounding():
    values = np.random.default_rng(0).normal(size=100_000)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        errors = values.astype(dtype).astype(np.float64) - values
        assert rounding_variance(values, np.dtype(dtype)) == pytest.approx(np.square(errors).mean(), rel=0.05)


def test_intervals_count_what_rounding_to_a_coarse_grid_biases(origin, parents, monkeypatch):
    """Differences of up to three steps of bfloat16, the hardest case: the jackknife covers a quarter of the shares."""
    models = models_of(origin, parents[:2], origin)
    place, step, rng = next(models.places()), 2.0**-7, np.random.default_rng(0)
    inside = {True: [], False: []}
    for _ in range(100):
        truth = rng.dirichlet([2, 2])
        ref = 1 + step * rng.integers(0, 100, size=(16, 128))
        x = step * rng.integers(-3, 4, size=(2, 16, 128))
        child = rounded(ref + np.tensordot(truth, x, 1), "bfloat16")
        z = np.stack([child - ref, *x, ref])
        sample = np.stack([child, ref, *(ref + x)]).reshape(4, -1).T.astype(np.float32)
        grams, counts = np.einsum("crn,drn->rcd", z, z), np.full(16, 128.0)
        tensor = TensorSums(place, grams, counts, sample, step**2 / 12, "bfloat16")
        for counted in inside:
            with monkeypatch.context() as patch:
                if not counted:
                    patch.setattr(shares, "_COARSE", ())
                low, high = estimate(models, [tensor]).interval()
            inside[counted].append((low <= truth) & (truth <= high))
    assert np.mean(inside[False]) < 0.5
    assert np.mean(inside[True]) > 0.85


def by_layer(name):
    return int(name.startswith("layers/1/"))


MADE = {
    "copy": lambda o, p: p[1],
    "stitched": lambda o, p: merging.stitched(p, by_layer),
    "linear": lambda o, p: merging.task_arithmetic(o, p, [0.7, 0.5]),
    "linear, by tensor": lambda o, p: {  # weights that differ between layers, and in MLPs
        name: merging.task_arithmetic(o, p, [0.3 + 0.4 * by_layer(name), 0.2 + 0.2 * ("/mlp/" in name)])[name]
        for name in o
    },
    "slerp": lambda o, p: merging.slerp(*p, 0.3),
    "ties": lambda o, p: merging.ties(o, p, [1.0, 0.5], 0.4),
    "dare_linear": lambda o, p: merging.dare(o, p, [0.6, 0.4], 0.5, elect=False),
    "dare_ties": lambda o, p: merging.dare(o, p, [0.6, 0.4], 0.5, elect=True),
}


def value_of(values, name, layer):
    """A parameter of mergekit for one tensor: the first filter that fits, then a gradient over the two layers."""
    names = {"norm": "norm", "self_attn": "/attn/", "mlp": "/mlp/", "embed_tokens": "embed/", "lm_head": "lm_head"}
    if isinstance(values, list) and isinstance(values[0], dict):
        values = next(own["value"] for own in values if names.get(own.get("filter"), "") in name)
    return values[layer or 0] if isinstance(values, list) else values


def made_again(recipe, name, origin, parents):
    """The leaf that mergekit would make by a recipe for models A and B of a base named origin."""
    config, layer = yaml.safe_load(recipe), int(name.split("/")[1]) if name.startswith("layers/") else None
    if "slices" in config:
        whose = {
            int(line.split()[-1] == "B") for line in recipe.splitlines() if line.startswith(f"# {name.split('/')[0]} ")
        }
        ranges = [own["sources"][0] for own in config["slices"]]
        in_layers = [own["model"] for own in ranges if layer in range(*own["layer_range"])]
        return parents["AB".index(in_layers[0]) if in_layers else whose.pop()][name]
    own = {given["model"]: given.get("parameters", {}) for given in config["models"]}
    named = {"A": parents[0], "B": parents[1], "origin": origin}
    models = [named[key] for key in own]
    here = [{name: model[name]} for model in models]
    base = {name: origin[name]}
    if config["merge_method"] == "slerp":
        assert config["base_model"] == next(iter(own))
        return merging.slerp(*here, value_of(config["parameters"]["t"], name, layer))[name]
    weights = [value_of(given["weight"], name, layer) for given in own.values()]
    if config["merge_method"] == "linear":
        return merging.linear(here, weights)[name]
    if config["merge_method"] == "task_arithmetic":
        return merging.task_arithmetic(base, here, weights)[name]
    (density,) = {round(given["density"], 2) for given in own.values()}
    assert config["parameters"] == {"normalize": True, "lambda": pytest.approx(1, abs=0.01)}
    return merging.ties(base, here, weights, density)[name]


def left_by(recipe, child, reference, parents):
    """What the merge by a recipe leaves of the child's difference from a model, in squares."""
    rest = sum(np.square(made_again(recipe, leaf, reference, parents) - own).sum() for leaf, own in child.items())
    return rest / sum(np.square(own - reference[leaf]).sum() for leaf, own in child.items())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "_" in name or name == "ties" else ()) for name in MADE]
)
def test_method_is_named_and_its_recipe_makes_the_child_again(origin, parents, name):
    child = MADE[name](origin, parents[:2])
    found = report_of(child, parents[:2], None if name in ("slerp", "stitched") else origin)
    assert found.record["method"]["name"] == name
    assert f"method: {name}" in repr(found)
    if name.startswith("dare"):
        assert set(found.parts.values()) == {"part"}
        for model_, weight in zip(yaml.safe_load(found.record["recipe"])["models"], (0.6, 0.4)):
            assert model_["parameters"] == {
                "weight": pytest.approx(weight, abs=0.05), "density": pytest.approx(0.5, abs=0.05)
            }  # fmt: skip
        follows = np.array(found.record["method"]["parameters"]["follows"])
        # Half are kept; of two of opposite signs, an eighth of all, the larger after weighting is elected.
        beaten = 2 / np.pi * np.arctan([0.4 / 0.6, 0.6 / 0.4])
        np.testing.assert_allclose(follows, 0.5 if name == "dare_linear" else 0.5 - 0.125 * beaten, atol=0.03)
        assert "entries that follow each parent: A" in repr(found)
        return
    left = left_by(found.record["recipe"], child, origin, parents)
    assert left < (2e-3 if name == "ties" else 1e-5)
    if name == "ties":
        deltas = [[w * merging._largest(p[n] - origin[n], 0.4) for w, p in zip((1.0, 0.5), parents)] for n in origin]
        wanted = [np.concatenate([merging._agreeing(own)[k].ravel() for own in deltas]).mean() for k in (0, 1)]
        assert found.record["method"]["parameters"]["follows"] == pytest.approx(wanted, abs=0.02)


@pytest.mark.slow
def test_what_a_recipe_leaves_is_that_of_the_merge_it_makes(origin, parents):
    """Over all entries, of children with noise; TIES and DARE need more than sums of products."""
    rng = np.random.default_rng(7)
    for name in MADE:
        made = MADE[name](origin, parents[:2])
        child = {leaf: values + 0.03 * rng.normal(size=values.shape) for leaf, values in made.items()}
        found = report_of(child, parents[:2], None if name in ("slerp", "stitched") else origin)
        told = found.record["recipe_residual"]
        if "task_arithmetic" in found.record["recipe"] or name in ("copy", "slerp", "stitched"):
            reference = parents[0] if name in ("slerp", "stitched") else origin
            assert told == pytest.approx(left_by(found.record["recipe"], child, reference, parents), rel=1e-6), name
            assert f"which leaves {100 * told:.3f} % of what differs (all entries)" in repr(found)
        else:
            assert told is None
    exact = report_of(MADE["linear"](origin, parents[:2]), parents[:2], origin)
    assert exact.record["recipe_residual"] < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_a_parent_without_a_part_hides_no_sparse_method(origin, parents, name):
    """Given first: no entry follows it, and the recipe does without."""
    child = MADE[name](origin, parents[:2])
    found = report_of(child, [parents[2], *parents[:2]], origin)
    method = found.record["method"]
    assert found.parts == {"A": "none", "B": "part", "C": "part"}
    assert method["name"] == name
    assert method["parameters"]["follows"][0] == 0 < min(method["parameters"]["follows"][1:])
    assert [own["model"] for own in yaml.safe_load(found.record["recipe"])["models"]] == ["B", "C"]


def test_layers_that_were_repeated_and_left_out_are_found(origin, parents):
    """A passthrough merge of layers 0, 1, 1, 0 of two parents: mapped, owned, and its recipe says where from."""
    of, owner = (0, 1, 1, 0), (0, 0, 1, 1)
    child = {name: leaf for name, leaf in parents[0].items() if not name.startswith("layers/")}
    for i, (j, k) in enumerate(zip(of, owner)):
        child |= {name.replace(f"layers/{j}/", f"layers/{i}/"): leaf
                  for name, leaf in parents[k].items() if name.startswith(f"layers/{j}/")}  # fmt: skip
    named = {name: model(parent) for name, parent in zip("AB", parents)}
    deeper = model(child, arch=dataclasses.replace(ARCH, num_layers=4))
    found = merge_report(MergeModels(deeper, named, model(origin)))
    assert found.record["layers"] == list(of)
    for i, k in enumerate(owner):
        shares = found.record["by_layer"][str(i)]["shares"]
        assert [shares[name]["share"] for name in "AB"] == pytest.approx(np.eye(2)[k], abs=1e-4)
    assert found.record["method"]["name"] == "stitched"
    sources = [own["sources"][0] for own in yaml.safe_load(found.record["recipe"])["slices"]]
    assert [(own["model"], *own["layer_range"]) for own in sources] == [("A", 0, 2), ("B", 1, 2), ("B", 0, 1)]
    assert "0-1 from 0-1, 2 from 1, 3 from 0" in repr(found)
    in_place = merge_report(MergeModels(model(parents[0]), named, model(origin)))
    assert in_place.record["layers"] is None


def test_repeated_layers_count_once_in_the_p_value(origin, parents):
    """The order of a parent's units is the same in all copies of a layer: their p-values are not independent."""
    models = dataclasses.replace(models_of(origin, parents[:2], origin), layers=((0, 1, 1, 1),) * 3)
    units = {i: [np.full((1, 1, 1), float(i))] for i in range(4)}
    assert sorted(_of_distinct_layers(models, units)) == [0, 1]


def test_child_that_no_method_explains_has_no_recipe(origin, parents):
    found = report_of(leaves(8), parents[:2], origin)
    assert found.record["recipe"] is None
    assert set(found.parts.values()) == {"not_testable"}
    assert (
        found.sentence == "not testable: the child's units are in no other model's order, where the test has no power"
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", ["permute", "pad,identity", "split"])
def test_reordered_and_padded_children_have_the_shares_of_the_child(origin, parents, names):
    """Where nothing but the order and the number of units changed, the other models stay as they are."""
    child = model(merging.task_arithmetic(origin, parents[:2], [0.6, 0.4]))
    hidden = in_memory(rewritten(child, draw_rewrites(names, jax.random.key(0), ARCH)))
    models = MergeModels(hidden, {"A": model(parents[0]), "B": model(parents[1])}, model(origin))
    found = merge_report(models, align=("auto",))
    assert found.record["aligned"]
    assert list(found.shares.values()) == pytest.approx([0.6, 0.4], abs=1e-5)
    assert set(found.parts.values()) == {"part"}  # their order is not the base's, to which the child was aligned
    assert found.sentence.startswith("merged of A (0.600")
    if names == "split":
        alone = merge_report(dataclasses.replace(models, origin=None), align=("auto",))
        assert alone.parts == {"A": "not_testable", "B": "part"}
        assert "B had a part" in alone.sentence


@pytest.mark.parametrize(
    ("names", "base", "message"),
    [("", None, "no parents were given"), ("A", None, "A alone has no share to estimate; give the base")],
)
def test_too_few_models_are_refused(origin, parents, names, base, message):
    with pytest.raises(MergeError, match=message):
        report_of(origin, parents[: len(names)], base)


def test_command_line(family, tmp_path, capsys, drawn):
    finetune, independent, base = (str(family.member(name)) for name in ("finetune", "independent", "base"))
    main(["merge", finetune, "--parents", finetune, independent, "--base", base, "--save", str(tmp_path / "m.json")])
    out = capsys.readouterr().out
    assert out.startswith(f"of the parents given, {finetune} alone has a part")
    assert (tmp_path / "m.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="are the same files"):
        main(["merge", finetune, "--parents", base, independent, "--base", base])
