"""Children mixed with a model of another family by optimal transport: units that are mixtures of its units."""

import dataclasses

import numpy as np
import pytest

from tests import tiny
from tests.test_merges import leaves, model, sibling
from tracing_jax.data import paired_one_to_one
from tracing_jax.merges import MergeError, MergeModels, merge_report
from tracing_jax.statistics import Vocabularies

ARCH = dataclasses.replace(tiny.llama_mha(), mlp_dim=64)
OTHER = dataclasses.replace(ARCH, mlp_dim=48)


def plan(rows, columns, softness, rng):
    """A transport plan: every row a mixture of columns; of softness 0 one column each, all columns in use."""
    order = np.concatenate([rng.permutation(columns), rng.integers(columns, size=max(0, rows - columns))])[:rows]
    hard = np.eye(columns)[order]
    weights = rng.exponential(size=(rows, columns)) * (rng.random((rows, columns)) < 4 / columns)
    soft = weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)
    return (1 - softness) * hard + softness * soft


def mixed(own, other, share, softness, seed=0):
    """A child of `own`, in its MLPs and its embedding mixed with `other` by plans over units and features."""
    rng = np.random.default_rng(seed)
    D = own["embed/embedding"].shape[1]
    features = plan(D, D, softness, rng)
    child = dict(own)
    child["embed/embedding"] = (1 - share) * own["embed/embedding"] + share * other["embed/embedding"] @ features.T
    for i in range(ARCH.num_layers):
        units = plan(ARCH.mlp_dim, OTHER.mlp_dim, softness, rng)
        for name in ("gate_proj", "up_proj"):
            at = f"layers/{i}/mlp/{name}/kernel"
            child[at] = (1 - share) * own[at] + share * features @ other[at] @ units.T
        at = f"layers/{i}/mlp/down_proj/kernel"
        child[at] = (1 - share) * own[at] + share * units @ other[at] @ features.T
    return child


OWN, THEIRS = leaves(0, ARCH), leaves(5, OTHER)


IDS = np.arange(ARCH.vocab_size, dtype=np.int32)
BLOCKS = np.random.default_rng(0).integers(ARCH.vocab_size, size=(8, 24)).astype(np.int32)
TEXT = Vocabularies(
    True, IDS, IDS, in_text=IDS >= 0, text_ids=(IDS, IDS), text_blocks=paired_one_to_one(BLOCKS, BLOCKS)
)


def report_of(child, others, **more):
    named = {"own": model(OWN, arch=ARCH)} | {name: model(own, arch=OTHER) for name, own in others.items()}
    return merge_report(MergeModels(model(child, arch=ARCH), named), **more)


@pytest.mark.slow
def test_agreement_falls_with_the_softness_of_the_mixture():
    """And the stranger never agrees."""
    log_ps = []
    for softness in (0.0, 0.3, 0.8):
        found = report_of(mixed(OWN, THEIRS, 0.3, softness), {"theirs": THEIRS, "stranger": leaves(6, OTHER)})
        assert found.sentence.startswith("no shares can be estimated")
        assert found.parts["stranger"] == "not_testable"
        assert found.parts["own"] == "not_testable"
        log_ps.append(found.record["other_shapes"]["theirs"]["log10_p"])
        assert found.parts["theirs"] == ("agrees" if log_ps[-1] < -3 else "not_testable")
    assert log_ps[0] < log_ps[1] < -3 < log_ps[2]


def test_parents_of_the_childs_shapes_keep_their_shares_beside_one_of_others():
    """What is left after them is matched: of the child itself nothing agrees."""
    second = sibling(OWN, 3)
    merge = {name: 0.5 * OWN[name] + 0.5 * second[name] for name in OWN}
    child = model(mixed(merge, THEIRS, 0.2, 0.0), arch=ARCH)
    named = {"own": model(OWN, arch=ARCH), "theirs": model(THEIRS, arch=OTHER), "second": model(second, arch=ARCH)}
    found = merge_report(MergeModels(child, named))
    assert found.shares["theirs"] is None
    assert found.shares["own"] == pytest.approx(0.5, abs=0.1)
    assert found.parts["theirs"] == "agrees"
    assert found.record["other_shapes"]["theirs"]["of_rest"]
    assert "theirs has other shapes and no share, and its units agree with the child's" in found.sentence
    assert "what the other parents leave of the child" in repr(found)


def test_no_parents_at_all_are_refused_as_before():
    with pytest.raises(MergeError, match="no parents were given"):
        merge_report(MergeModels(model(OWN, arch=ARCH), {}))


@pytest.mark.slow
def test_units_that_agree_on_tokens_that_no_text_has_are_no_evidence():
    """Such tokens can have any embedding, and so one by which another model's units agree: a stranger is not named."""
    arch = dataclasses.replace(ARCH, vocab_size=600, embed_dim=96, num_layers=1)
    other = dataclasses.replace(arch, mlp_dim=48)
    stranger, child = leaves(0, arch), leaves(5, other)
    units = [np.concatenate([own[f"layers/0/mlp/{name}/kernel"].T[:24] for name in ("gate_proj", "up_proj")])
             for own in (stranger, child)]  # fmt: skip
    ids = np.arange(600, dtype=np.int32)
    in_text = ids < 120
    answers = stranger["embed/embedding"][~in_text] @ units[0].T
    child["embed/embedding"][~in_text] = np.linalg.lstsq(units[1], answers.T)[0].T
    models = MergeModels(
        model(child, arch=other), {"stranger": model(stranger, arch=arch)}, model(leaves(5, other), arch=other)
    )
    assert merge_report(models).parts["stranger"] == "agrees"  # as if all of them were read
    blocks = np.random.default_rng(0).integers(120, size=(8, 24)).astype(np.int32)
    text = Vocabularies(
        True, ids, ids, in_text=in_text, text_ids=(ids[:120],) * 2, text_blocks=paired_one_to_one(blocks, blocks)
    )
    for vocabularies in (text, Vocabularies(True, ids, ids, known=False)):
        found = merge_report(models, vocabularies_of=lambda name, own=vocabularies: own)
        assert found.parts["stranger"] == "not_testable"
    assert "which is no evidence: without a tokenizer of both models" in repr(found)
    mixture = report_of(mixed(OWN, THEIRS, 0.3, 0.0), {"theirs": THEIRS}, vocabularies_of=lambda name: TEXT)
    assert mixture.parts["theirs"] == "agrees"
