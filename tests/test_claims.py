"""Claims on a pair: each holds where it was made true, is contradicted where it was made false, and says no more."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import derived_models as make
import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from cases import diagonal
from derived_models import derived
from safetensors.numpy import save_file
from scipy.stats import norm
from test_gguf import _LLAMA, _theta, _written

import tracing_jax as tj
from tracing_jax import cli
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.checkpoint.tensor_layout import TensorSlice
from tracing_jax.checkpoint.tensors import open_tensors
from tracing_jax.claims import ASSERTS, UNTESTED, ClaimInputs, ClaimResult, check_claim, quantised_copies, tensor_pairs
from tracing_jax.claims.low_rank import low_rank_differences, numerical_rank
from tracing_jax.claims.quantised_copies import _TABLES, copy_of
from tracing_jax.claims.same_function import coarsest_dtype
from tracing_jax.claims.tensor_pairs import TensorPair
from tracing_jax.cli.program import exit_status
from tracing_jax.dataclass_options import ConfigError, problems
from tracing_jax.experiment import check_config
from tracing_jax.experiment.identity import identical_tensors
from tracing_jax.options import CLAIMS, RunOptions
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import Pair, Verdict, Vocabularies
from tracing_jax.tree import map_named


def judged(
    claim: str, base: Path, ft: Path, word: str = "related", parts: Any = None, **changes: object
) -> ClaimResult:
    """Judges a claim with the verdict given: the tests themselves have tests of their own."""
    one, other = open_checkpoint(str(base)), open_checkpoint(str(ft))
    ids = np.arange(one.arch.vocab_size, dtype=np.int32)
    pair = Pair(one, other, Vocabularies(True, ids, ids), None, Compute(make_mesh(1, 1)), 0)
    said = Verdict(word, "as the test has it", 1e-3, identical=identical_tensors(one, other), parts=parts or {})
    return check_claim(claim, replace(ClaimInputs(one, other, pair, said, {}, 0), **changes))


@pytest.fixture(scope="module")
def base(family):
    return family.member("base")


@pytest.fixture(scope="module")
def finetune(family):
    return family.member("finetune")


def test_every_claim_says_what_it_asserts_and_what_it_does_not(base):
    assert set(ASSERTS) == set(UNTESTED) == set(CLAIMS)
    for claim in CLAIMS:
        found = judged(claim, base, base, "identical")
        assert found.outcome == ("holds" if claim == "same-as" else "contradicted")


# same-as


def test_same_as_tells_equal_numbers_rounded_ones_and_rewrites_apart(base, finetune, family, tmp_path):
    half = derived(base, tmp_path / "half", make.rounded)
    assert judged("same-as", base, base).evidence["how"] == "numbers"
    assert judged("same-as", base, half).evidence["how"] == judged("same-as", half, base).evidence["how"] == "rounded"
    hidden = judged("same-as", finetune, family.member("disguised"))
    assert (hidden.outcome, hidden.evidence["how"]) == ("holds", "function")
    assert judged("same-as", base, finetune).outcome == "contradicted"
    assert judged("same-as", base, family.member("independent")).outcome == "contradicted"


def test_same_as_takes_the_coarsest_dtype_where_no_tensor_has_a_counterpart(base, tmp_path):
    one = open_checkpoint(str(derived(base, tmp_path / "one", lambda t: make.rounded(t, ml_dtypes.bfloat16))))
    assert coarsest_dtype(one).name == "bfloat16"
    other = in_memory(rewritten(one, draw_rewrites("pad", jax.random.key(3), one.arch)))
    coarse = map_named(lambda name, leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), other.params)
    tj.save(tmp_path / "padded", InMemory(other.arch, coarse), companions=one.folder)
    assert judged("same-as", one.folder, tmp_path / "padded").outcome == "holds"


def test_same_as_looks_at_embeddings_of_tokens_that_were_not_read(finetune, tmp_path):
    one = open_checkpoint(str(finetune))
    ids = np.arange(one.arch.vocab_size, dtype=np.int32)
    read = np.random.default_rng([0, zlib.crc32(b"same function")]).integers(len(ids), size=(4, 32))

    def changed(tensors):
        rows = np.array(tensors["model.embed_tokens.weight"])
        rows[np.setdiff1d(ids, read)[:3]] *= 1.5
        return tensors | {"model.embed_tokens.weight": rows}

    other = open_checkpoint(str(derived(finetune, tmp_path / "changed", changed)))
    hidden = in_memory(rewritten(other, draw_rewrites("permute,rotate", jax.random.key(3), one.arch)))
    pair = Pair(one, hidden, Vocabularies(True, ids, ids), None, Compute(make_mesh(1, 1)), 0)
    found = judged("same-as", finetune, other.folder, pair=pair)
    assert (found.outcome, found.evidence["other_rows"]) == ("contradicted", 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "names", ["permute", "rotate", "gains", "units", "values", "queries", "pad", "identity", "all"]
)
def test_every_rewrite_is_the_same_model_and_a_little_training_is_not_called_so(names, dtype, base, finetune, tmp_path):
    one = open_checkpoint(str(derived(base, tmp_path / "one", lambda t: make.rounded(t, dtype))))
    listed = "identity,pad,gains,units,values,queries,rotate,permute" if names == "all" else names
    other = in_memory(rewritten(one, draw_rewrites(listed, jax.random.key(3), one.arch)))
    ids = np.arange(one.arch.vocab_size, dtype=np.int32)
    pair = Pair(one, other, Vocabularies(True, ids, ids), None, Compute(make_mesh(1, 1)), 0)
    moved = derived(base, tmp_path / "moved", lambda t: make.rounded(make.adapted(t, 8, 0.3), dtype))
    found = judged("same-as", one.folder, moved, pair=pair)  # the files differ, as those of the rewritten model do
    assert found.outcome == "holds", found.because
    small = derived(base, tmp_path / "small", lambda t: make.rounded(make.adapted(t, 8, 1e-3), dtype))
    assert judged("same-as", one.folder, small).outcome in ("contradicted", "not_testable")


def test_models_without_common_tokens_are_not_called_the_same_or_different(base, finetune):
    one, other = (open_checkpoint(str(folder)) for folder in (base, finetune))
    none = np.zeros(0, np.int32)
    pair = Pair(one, other, Vocabularies(False, none, none), None, Compute(make_mesh(1, 1)), 0)
    found = judged("same-as", base, finetune, pair=pair)
    assert found.outcome == "not_testable"
    assert "share 0 tokens" in found.because


# finetune-of, merge-of, from-scratch: what the verdict says


@pytest.mark.parametrize(("word", "outcomes"), [
    ("related", {"finetune-of": "holds", "merge-of": "not_testable", "from-scratch": "contradicted"}),
    ("no_evidence", {"finetune-of": "contradicted", "merge-of": "contradicted", "from-scratch": "holds"}),
    ("undecided", dict.fromkeys(("finetune-of", "merge-of", "from-scratch"), "not_testable")),
    ("not_testable", dict.fromkeys(("finetune-of", "merge-of", "from-scratch"), "not_testable")),
    ("not_asked", dict.fromkeys(("finetune-of", "merge-of", "from-scratch"), "not_testable")),
])  # fmt: skip
def test_a_claim_of_descent_follows_the_verdict_and_says_no_more(word, outcomes, base, finetune):
    for claim, outcome in outcomes.items():
        assert judged(claim, base, finetune, word).outcome == outcome


def test_of_models_that_were_read_in_part_nothing_found_decides_nothing(base, finetune):
    scope = "only the vision tower was read"
    for claim in ("finetune-of", "merge-of", "from-scratch"):
        assert judged(claim, base, finetune, "no_evidence", scope=scope).outcome == "not_testable"
        found = judged(claim, base, finetune, "no_evidence", is_default=False)
        assert (found.outcome, "run auto" in found.because) == ("not_testable", True)
    found = judged("finetune-of", base, finetune, "related", scope=scope)
    assert found.outcome == "holds"
    assert found.because.endswith(scope)


def test_claims_of_descent_say_which_parts_are_related(base, finetune, tmp_path):
    """Heads of base beside MLPs of another model, fewer units of them, are no pruned base."""

    def found(ft, claim, **parts):
        parts = {name: {"verdict": word, "statistic": "match"} for name, word in parts.items()}
        one, other = open_checkpoint(str(base)), open_checkpoint(str(ft))
        said = Verdict("related", "x", 1e-3, identical=identical_tensors(one, other), parts=parts)
        return judged(claim, base, ft, verdict=said)

    narrow = derived(finetune, tmp_path / "narrow", lambda t: make.with_units(t, np.arange(20)), intermediate_size=20)
    heads = found(narrow, "pruned-of", attention="related", MLPs="no_evidence")
    assert heads.outcome == "not_testable"
    assert (
        "but of the MLPs, which are smaller, this was not found: attention related, MLPs no evidence" in heads.because
    )
    assert found(narrow, "pruned-of", attention="undecided", MLPs="related").outcome == "holds"
    tuned = found(finetune, "finetune-of", attention="related", MLPs="undecided")
    assert tuned.outcome == "holds"
    assert tuned.because.endswith("by part: attention related, MLPs undecided")
    assert "which of the two was there first" in found(narrow, "pruned-of", MLPs="related").not_said


def test_a_related_model_of_another_shape_is_no_finetune(base, tmp_path):
    shallow = derived(base, tmp_path / "shallow", lambda t: make.without_layer(t, 0), num_hidden_layers=1)
    found = judged("finetune-of", base, shallow)
    assert found.outcome == "contradicted"
    assert "layers" in found.because


# adapter-of


def test_the_numerical_rank_of_a_noisy_product_is_that_of_the_product():
    rng = np.random.default_rng(0)
    for rank in (0, 1, 5, 20):
        matrix = rng.normal(size=(80, rank)) @ rng.normal(size=(rank, 60)) + 1e-3 * rng.normal(size=(80, 60))
        assert numerical_rank(matrix, 1.1e-3) == rank
    assert numerical_rank(rng.normal(size=(80, 60)), 1e-3) == 60


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e-3), (np.float32, 0.3), (ml_dtypes.bfloat16, 0.3)])
def test_an_adapter_is_found_with_its_rank(dtype, size, base, tmp_path):
    one = derived(base, tmp_path / "one", lambda t: make.rounded(t, dtype))
    merged = derived(one, tmp_path / "merged", lambda t: make.adapted(t, 3, size, dtype))
    found = judged("adapter-of", one, merged)
    assert (found.outcome, found.evidence["rank"]) == ("holds", 3), found.because


def test_rounding_that_hides_the_rank_is_said(base, tmp_path):
    one = derived(base, tmp_path / "one", make.rounded)
    merged = derived(one, tmp_path / "merged", lambda t: make.adapted(t, 3, 2e-3, ml_dtypes.bfloat16))
    assert judged("adapter-of", one, merged).outcome == "not_testable"


def test_training_of_all_weights_norms_or_another_shape_is_no_adapter(base, finetune, tmp_path):
    assert "norms" in judged("adapter-of", base, finetune).because

    def noisy(tensors):
        rng = np.random.default_rng(0)
        return {n: w + 0.01 * rng.normal(size=w.shape).astype(w.dtype) if make.is_linear(n) else w
                for n, w in tensors.items()}  # fmt: skip

    found = judged("adapter-of", base, derived(base, tmp_path / "noisy", noisy))
    assert found.outcome == "contradicted"
    assert "not of low rank" in found.because
    shallow = derived(base, tmp_path / "shallow", lambda t: make.without_layer(t, 0), num_hidden_layers=1)
    assert judged("adapter-of", base, shallow).outcome == "contradicted"


def pair_of(base, ours, theirs, folder):
    """One tensor of two checkpoints, from files."""
    sides = []
    for name, weights in (("ours", ours), ("theirs", theirs)):
        (folder / name).mkdir(exist_ok=True)
        save_file({"w": weights}, folder / name / "model.safetensors")
        sides.append(replace(open_checkpoint(str(base)), tensors=open_tensors(folder / name)))
    return TensorPair("w", *sides, *[TensorSlice("w", weights.shape) for weights in (ours, theirs)])


@pytest.mark.parametrize(("shape", "rows"), [
    ((8192, 96), slice(100, 600)), ((3000, 1500), slice(700, 1400)), ((3, 200, 96), slice(60, 160)),
])  # fmt: skip
def test_a_block_of_rows_that_was_changed_is_of_no_low_rank(shape, rows, base, tmp_path):
    """Wherever it is, and an update of rank 8 of the same rows, or of one row, is of the rank that it has."""
    rng = np.random.default_rng(0)
    ours = rng.normal(size=shape).astype(np.float32)
    noise = rng.normal(size=ours[..., rows, :].shape)
    low = rng.normal(size=(*noise.shape[:-1], 8)) @ rng.normal(size=(8, shape[-1]))
    for change, rank in ((noise, None), (low, 8), (np.eye(noise.shape[-2])[:, :1] * noise[..., :1, :], 1)):
        theirs = ours.copy()
        theirs[..., rows, :] += (0.1 * change).astype(np.float32)
        found = low_rank_differences(pair_of(base, ours, theirs, tmp_path), np.random.default_rng(1))
        assert len(found) == (shape[0] if len(shape) == 3 else 1)
        for difference in found:
            assert difference.rank == rank or (rank is None and not difference.is_low and difference.rank > 64)
            exact = np.sqrt(np.square(theirs - ours).mean() / np.square(ours).mean())
            if len(shape) == 2:
                assert difference.change == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_a_slice_are_those_that_belong_to_its_leaf(axis, base, tmp_path):
    """Of an interleaved gate and up every second row, or column, belongs to either."""
    weights = np.arange(12 * 10, dtype=np.float32).reshape(12, 10)
    whole = pair_of(base, weights, weights, tmp_path)
    for start in (0, 1):
        part = replace(whole.slice_base, axis=axis, start=start, stop=10 if axis == 0 else 8, step=2)
        pair = replace(whole, slice_base=part, slice_ft=part)
        expected = weights[start:10:2] if axis == 0 else weights[:, start:8:2]
        assert pair.shape == expected.shape
        np.testing.assert_array_equal(pair.rows(1, 4)[0], expected[1:4])
        np.testing.assert_array_equal(np.concatenate([ours for ours, _ in pair.chunks()]), expected)


# quantised-of


def on_grid(weights, bits):
    """Rounded to 255 steps of the largest magnitude of a row, or groups of 32 to 16 values of uneven numbers."""
    if bits == 8:
        scale = np.abs(weights).max(axis=-1, keepdims=True) / np.float32(127)
        return np.round(weights / scale) * scale
    groups = weights.reshape(-1, 32)
    step = np.ptp(groups, axis=1, keepdims=True) / np.float32(13.3)
    return (np.round(groups / step) * step).reshape(weights.shape)


@pytest.mark.parametrize("shape", [(4096, 64), (1024, 96), (5, 300, 64)])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_row_is_quantised_again(shape, bits, base, tmp_path):
    """Not those of a sample alone: the others may be of another model, or one of them."""
    rng = np.random.default_rng(0)
    ours, stranger = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    copy, other = (on_grid(weights, bits) for weights in (ours, stranger))
    honest = copy_of(pair_of(base, ours, copy, tmp_path), False)
    if bits == 8:
        assert (honest.kind, honest.weights, honest.differing, honest.least) == ("int8 per row", ours.size, 0, 1)
    else:  # a grid of no known format: within half a step
        assert (honest.kind, honest.within, honest.least) == ("other", 1, 1)
    count = int(np.prod(shape[:-1]))
    sampled = np.unique([start + i for start in np.linspace(0, shape[0] - 16, 16).astype(int) for i in range(16)])
    kept = np.zeros(shape[0], bool)
    kept[sampled if len(shape) == 2 else slice(0, 1)] = True
    most, one = copy.copy(), copy.copy()
    most[~kept] = other[~kept]
    one.reshape(count, -1)[777] = other.reshape(count, -1)[777]
    for forged in (most, one):
        found = copy_of(pair_of(base, ours, forged, tmp_path), False)
        assert found.kind == "other"
        assert found.least < 0.8 or found.share < 0.5
        if bits == 8:
            assert (found.nearest, found.is_on_grid) == ("int8 per row", True)
    assert found.row == 777


@pytest.mark.parametrize("planted", ["floats", "constants", "last columns"])
def test_weights_without_a_grid_of_their_own_are_counted(planted, base, tmp_path, monkeypatch):
    """A copy in 4 bits of which some weights are of another model, where the copy shows no step."""
    monkeypatch.setattr(tensor_pairs, "_CHUNK", 1000)
    rng = np.random.default_rng(0)
    ours, stranger = (rng.normal(size=(1200, 100)).astype(np.float32) for _ in range(2))
    copy = np.concatenate([on_grid(ours[:, :96], 4), ours[:, 96:].round(1)], axis=1)
    honest = copy_of(pair_of(base, ours, copy, tmp_path), False)
    assert (honest.within, honest.least) == (1, 1)
    if planted == "last columns":
        copy[:, 96:] = stranger[:, 96:]
    else:
        copy[700:720] = stranger[700:720] if planted == "floats" else 3 * np.sign(stranger[700:720, :1])
    found = copy_of(pair_of(base, ours, copy, tmp_path), False)
    assert found.kind == "other"
    assert found.within < 0.99
    if planted != "last columns":
        assert found.least < 0.2
        assert 700 <= found.row < 720


@pytest.mark.parametrize("quantise", [make.int8, make.int4])
def test_rows_of_another_model_outside_of_the_sample_contradict(quantise, base, tmp_path, monkeypatch):
    monkeypatch.setattr(quantised_copies, "SAMPLE", 16)

    def mixed(tensors):
        found = {}
        for name, weights in tensors.items():
            sampled = np.isin(np.arange(len(weights)), np.linspace(0, len(weights) - 1, 16).astype(int))
            found[name] = np.where(sampled[:, None], weights, -weights) if make.is_linear(name) else weights
        return found

    assert judged("quantised-of", base, derived(base, tmp_path / "copy", quantise)).outcome == "holds"
    forged = derived(base, tmp_path / "forged", lambda tensors: quantise(mixed(tensors)))
    found = judged("quantised-of", base, forged)
    assert found.outcome == "contradicted", found.because


@pytest.mark.parametrize(("quantise", "name"), [
    (make.int8, "int8 per row"), (make.float8, "FP8 per tensor"), (make.nf4, "NF4"),
])  # fmt: skip
def test_a_copy_in_a_format_that_rounds_to_nearest_is_reproduced(quantise, name, base, finetune, tmp_path):
    copy = derived(base, tmp_path / "copy", quantise)
    found = judged("quantised-of", base, copy)
    assert found.outcome == "holds", found.because
    assert found.evidence["kinds"].get(name, 0) + found.evidence["kinds"].get("Q8_0", 0) == 14  # rows of 32 are both
    of_another = judged("quantised-of", finetune, copy)
    assert of_another.outcome == "contradicted", of_another.because
    slightly = derived(base, tmp_path / "slightly", lambda t: quantise(make.adapted(t, 4, 0.02)))
    assert judged("quantised-of", base, slightly).outcome == "contradicted"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16"])
def test_a_gguf_file_is_reproduced_with_the_rows_of_its_queries_in_another_order(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    theta = _theta(_LLAMA, "llama")
    original = _written(tmp_path / "original.gguf", _LLAMA, "llama", **theta)
    copy = _written(tmp_path / "copy.gguf", _LLAMA, "llama", gguf.GGMLQuantizationType[kind], **theta)
    found = judged("quantised-of", original, copy)
    assert found.outcome == "holds", found.because
    assert "other" not in found.evidence["kinds"]


@pytest.mark.parametrize(("dtype", "quantise"), diagonal(["float16", "bfloat16"], ["int8", "nf4", "float8"]))
def test_a_copy_of_the_weights_before_they_were_rounded_is_not_called_that_of_others(
    dtype, quantise, base, finetune, tmp_path
):
    copy = derived(base, tmp_path / "copy", getattr(make, quantise))
    half = derived(base, tmp_path / "half", lambda t: make.rounded(t, np.dtype(dtype)))
    assert judged("quantised-of", half, copy).outcome == "holds"
    assert judged("quantised-of", finetune, copy).outcome == "contradicted"


def test_of_a_base_that_is_quantised_itself_the_original_is_not_at_hand(base, finetune, tmp_path):
    copies = derived(base, tmp_path / "copy", make.int8), derived(finetune, tmp_path / "other", make.float8)
    assert judged("quantised-of", *copies).outcome == "not_testable"


def test_an_unknown_grid_is_bounded_by_its_steps_and_said_to_be(base, finetune, tmp_path):
    copy = derived(base, tmp_path / "copy", make.int4)
    found = judged("quantised-of", base, copy)
    assert found.outcome == "holds"
    assert found.evidence["bounded"]
    assert "training by less than a step would not show" in found.because
    assert judged("quantised-of", finetune, copy).outcome == "contradicted"


def test_channels_that_were_rescaled_before_rounding_are_said_to_be(base, tmp_path):
    def scaled(tensors):
        rng = np.random.default_rng(0)
        return {n: w * np.exp(rng.normal(size=w.shape[1])).astype(np.float32) if make.is_linear(n) else w
                for n, w in tensors.items()}  # fmt: skip

    copy = derived(base, tmp_path / "copy", lambda t: make.int4(scaled(t)))
    found = judged("quantised-of", base, copy)
    assert found.outcome == "not_testable"
    assert "rescaled" in found.because


def test_what_is_not_quantised_is_no_quantised_copy(base, finetune, tmp_path):
    assert judged("quantised-of", base, finetune).outcome == "contradicted"
    half = derived(base, tmp_path / "half", make.rounded)
    assert judged("quantised-of", base, half).outcome == "holds"
    assert judged("quantised-of", half, base).outcome == "contradicted"


def test_the_table_of_nf4_is_that_of_its_definition():
    """QLoRA, equation 4: quantiles of the normal distribution, seven below zero and eight above, over the largest."""
    offset = 0.9677083
    above, below = norm.ppf(np.linspace(offset, 0.5, 9))[:-1], -norm.ppf(np.linspace(offset, 0.5, 8))[:-1]
    table = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(_TABLES["NF4"], table / table.max(), atol=1e-4)


# pruned-of


def test_dropped_layers_and_units_are_found_bit_for_bit(base, finetune, tmp_path):
    shallow = derived(base, tmp_path / "shallow", lambda t: make.without_layer(t, 0), num_hidden_layers=1)
    found = judged("pruned-of", base, shallow, "undecided")
    assert found.outcome == "holds"
    assert [layer["base"] for layer in found.evidence["layers"]] == [1]
    kept = np.array([60, 3, 5, 7, 11, 20, 21, 22, 40, 41, 42, 43])
    narrow = derived(base, tmp_path / "narrow", lambda t: make.with_units(t, kept), intermediate_size=len(kept))
    assert judged("pruned-of", base, narrow, "undecided").outcome == "holds"
    assert judged("pruned-of", narrow, base).outcome == "contradicted"  # the larger one is not the pruned one
    assert judged("pruned-of", finetune, narrow, "no_evidence").outcome == "contradicted"
    assert judged("pruned-of", finetune, narrow, "undecided").outcome == "not_testable"
    related, open_ = {"MLPs": {"verdict": "related"}}, {"attention": {"verdict": "related"}}
    healed = judged("pruned-of", finetune, narrow, "related", parts=related)
    assert healed.outcome == "holds"
    assert "changed since" in healed.because
    for parts in ({}, open_, open_ | {"MLPs": {"verdict": "undecided"}}):  # of the MLPs, which are smaller, nothing
        found = judged("pruned-of", finetune, narrow, "related", parts=parts)
        assert found.outcome == "not_testable"
        assert "MLPs, which are smaller" in found.because


def test_weights_set_to_zero_are_counted(base, finetune, tmp_path):
    def sparse(tensors):
        return {n: np.where(np.abs(w) < 0.5 * w.std(), 0, w) if make.is_linear(n) else w for n, w in tensors.items()}

    nothing = derived(base, tmp_path / "nothing", lambda tensors: {name: 0 * w for name, w in tensors.items()})
    assert judged("pruned-of", base, nothing).outcome == "not_testable"
    pruned = derived(base, tmp_path / "sparse", sparse)
    found = judged("pruned-of", base, pruned)
    assert found.outcome == "holds"
    assert found.evidence["zeros"] > 0.1 * found.evidence["weights"]
    half = derived(pruned, tmp_path / "half", make.rounded)
    assert judged("pruned-of", base, half).outcome == "holds"

    def changed(name, index):
        def change(tensors):
            tensors[name] = tensors[name].copy()
            tensors[name][index] += 0.5
            return tensors

        return change

    for name, index, expected in (
        ("model.layers.0.mlp.up_proj.weight", (3, 5), "1 were changed"),
        ("model.norm.weight", 3, "1 vectors"),
    ):
        one = derived(pruned, tmp_path / name, changed(name, index))
        found = judged("pruned-of", base, one)
        assert found.outcome == "not_testable"
        assert expected in found.because
    other = derived(finetune, tmp_path / "other", sparse)
    assert judged("pruned-of", base, other).outcome == "not_testable"
    assert judged("pruned-of", base, finetune).outcome == "contradicted"


# the command line


def test_the_exit_status_is_that_of_the_worst_pair():
    def record(word, outcome=None):
        return {"verdict": {"verdict": word}, "claim": outcome and {"outcome": outcome}}

    assert exit_status([record("related")], ()) == 0
    assert exit_status([record("related"), record("identical")], ("related",)) == 3
    assert exit_status([record("no_evidence")], ("independent",)) == 3
    assert exit_status([record("related", "holds")], ()) == 0
    assert exit_status([record("related", "not_testable"), record("related", "holds")], ()) == 4
    assert exit_status([record("related", "not_testable"), record("related", "contradicted")], ()) == 3


def test_a_claim_is_about_the_files_as_they_are():
    options = RunOptions(base_model_id="a", ft_model_id="b", stat=("csu",), save=None, claim="same-as", permute=True)
    with pytest.raises(ConfigError, match="leave permute out"):
        check_config(options)
    assert "did you mean finetune-of" in problems(RunOptions(claim="fintune-of"))[0]


@pytest.mark.slow
def test_compare_tests_a_claim_and_its_status_says_what_became_of_it(
    base, finetune, family, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pair = [str(base), str(finetune)]
    cli.main(["compare", *pair, "--stat", "csu,match", "--claim", "finetune-of", "--quiet"])
    assert capsys.readouterr().out.startswith("CLAIM HOLDS  finetune-of: ")
    record = json.loads(Path("runs/compare.json").read_text())
    assert record["claim"]["outcome"] == "holds"
    assert "Claim: finetune-of" in Path("runs/compare.html").read_text()
    for argv, status in (
        ([*pair, "--claim", "from-scratch"], 3),
        ([*pair, "--claim", "merge-of"], 4),
        ([str(base), str(family.member("independent")), "--claim", "finetune-of"], 3),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *argv])
        assert ended.value.code == status


def test_the_help_of_compare_lists_what_the_exit_status_says(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert "3    the claim is contradicted" in shown
    assert "4    the claim cannot be tested" in shown
