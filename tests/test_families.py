"""Pairs of tiny models of families of transformers: permuted copies are related, strangers never are."""

import pytest

from benchmarks import families

_DOZEN = (
    "bloom ctrl deepseek_v3 falcon_mamba gpt_neox gpt_oss jamba minimax modernbert-decoder mpt nemotron_h qwen3_next"
)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("family", _DOZEN.split())
def test_a_permuted_copy_is_related_and_a_stranger_is_not(family):
    pytest.importorskip("torch")
    row = families.sweep(family)
    assert row.outcome == "right", row


def test_outcomes_of_rows():
    tried = families.Row("x", "weights", "related", "undecided")
    assert tried.outcome == "right"
    assert families.Row("x", "weights", "undecided", "undecided").outcome == "undecided"
    assert families.Row("x", "weights", "related", "related").outcome == "wrong"
    assert families.Row("x", "weights", "no_evidence", "undecided").outcome == "wrong"
    assert families.Row("x", "none").outcome == "refused"
    assert families.Row("x", "not tried").outcome == "not tried"
    assert "1 right" in families.page([tried], "5")
