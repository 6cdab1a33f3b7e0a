"""Pairs of tiny models of families of transformers: permuted copies are related, independent models never are."""

from typing import Any

import pytest

from benchmarks import attributes, families, published_configs, published_layouts
from tracing_jax.arch import rope

_DOZEN = (
    "bloom ctrl deepseek_v3 falcon_mamba gpt_neox gpt_oss jamba minimax modernbert-decoder mpt nemotron_h qwen3_next"
)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("family", _DOZEN.split())
def test_a_permuted_copy_is_related_and_a_stranger_is_not(family):
    pytest.importorskip("torch")
    row = families.sweep(family)
    # Where only features can be compared, what is found is reserved.
    assert row.outcome == ("undecided" if family == "falcon_mamba" else "right"), row


def test_outcomes_of_rows():
    tried = families.Row("x", "weights", "related", "undecided")
    assert tried.outcome == "right"
    assert families.Row("x", "weights", "undecided", "undecided").outcome == "undecided"
    assert families.Row("x", "weights", "related", "related").outcome == "wrong"
    assert families.Row("x", "weights", "no_evidence", "undecided").outcome == "wrong"
    assert families.Row("x", "none").outcome == "refused"
    assert families.Row("x", "not tried").outcome == "not tried"


def test_rows_of_other_families_stay_in_the_page():
    first = families.page([families.Row("x", "weights", "related", "undecided", "csu, match"),
                           families.Row("y", "not tried", cause="no | model")], "5", "2026-01-01")  # fmt: skip
    assert "1 right, 1 not tried; tried 2026-01-01: 2" in " ".join(first.split())
    again = families.page([families.Row("y", "weights", "undecided", "undecided")], "5", "2026-02-01", first)
    assert "1 right, 1 undecided; tried 2026-01-01: 1, 2026-02-01: 1" in " ".join(again.split())
    assert "| x | weights |  | related | undecided | 2 | 2026-01-01 |  |" in again
    assert "2026-02-01" in families.page([], "5", "2026-03-01", again)


_PUBLISHED = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 128000, "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def test_a_shrunken_config_differs_in_sizes_alone():
    small = published_configs.shrunken(_PUBLISHED)
    assert small.keys() == _PUBLISHED.keys()
    same = ("model_type", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "rope_scaling")
    assert all(small[name] == _PUBLISHED[name] for name in same)
    assert 1 < small["num_key_value_heads"] < small["num_attention_heads"]
    assert small["bos_token_id"] < small["vocab_size"] < 1000


def test_configs_without_a_forward_pass_count_as_read_only_where_a_model_was_opened():
    def row(**facts: Any) -> published_configs.Row:
        return published_configs.Row("here", "flux", cause="no forward pass", **facts)

    opened = {"level": "weights", "opened": True, "maker": "names", "parts": "up, down"}
    rows = [row(**opened), row(**opened, misread="up is a, found b"), row(level="weights", remark="no tiny model"),
            row(level="refused", maker="transformers")]  # fmt: skip
    assert [row.is_wrong for row in rows] == [False, True, False, False]
    text = " ".join(published_configs.section(rows).split())
    assert "4 have no forward pass here" in text
    assert "of 1 none was made. 2 were read by their weights alone" in text
    assert "1 were refused. Of the 2 made from names, 1 had a part that was not found where it is." in text
    assert "| flux | names | up, down; not as it is: up is a, found b | 1 |" in text


@pytest.mark.parametrize("kind", published_layouts.LAYOUTS)
def test_parts_of_published_layouts_are_found_where_they_are(kind):
    row = published_configs.tried({"source": "here", "config": {"model_type": kind, "hidden_act": "silu"}})
    assert (row.opened, row.maker, row.misread) == (True, "names", "")
    assert "down" in row.parts


def test_a_part_that_is_found_elsewhere_is_reported(monkeypatch):
    text = published_layouts.LAYOUTS["internlm2"].replace("w1.weight F D = gate", "w1.weight F D = up")
    text = text.replace("w3.weight F D = up", "w3.weight F D = gate")
    monkeypatch.setattr(published_layouts, "LAYOUTS", {"internlm2": text})
    row = published_configs.tried({"source": "here", "config": {"model_type": "internlm2"}})
    assert row.is_wrong
    assert "gate is model.layers.{layer}.feed_forward.w3.weight, found model.layers.{layer}." in row.misread


@pytest.mark.parametrize("part", [
    (attributes, "--families", "llama"), (published_configs, "--only", "llama", "FILE"),
], ids=lambda part: part[1])  # fmt: skip
def test_counts_of_a_part_do_not_replace_those_of_the_whole(part, monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("the whole")
    monkeypatch.setattr(part[0], "TABLE", page)
    monkeypatch.setattr("sys.argv", ["benchmark", *part[1:], "--write"])
    with pytest.raises(SystemExit):
        part[0].main()
    assert f"--write with {part[1]}: the page holds the counts of all" in capsys.readouterr().err
    assert page.read_text() == "the whole"


@pytest.mark.slow
@pytest.mark.torch
def test_a_published_config_is_read_and_computed_and_a_wrong_reading_is_seen(monkeypatch):
    pytest.importorskip("torch")
    row = published_configs.tried({"source": "here", "config": _PUBLISHED})
    assert (row.level, row.is_wrong) == ("forward", False)
    assert row.error is not None
    monkeypatch.setattr("tracing_jax.arch.config.ropes", lambda *_, **__: rope.NO_ROPE)
    assert published_configs.tried({"source": "here", "config": _PUBLISHED}).is_wrong


@pytest.mark.slow
@pytest.mark.torch
def test_changed_attributes_are_refused_or_computed(tmp_path):
    pytest.importorskip("torch")
    changes = dict(attributes.changed_configs("llama"))
    found = {}
    for name in ("attention_bias True", "hidden_act relu", "head_dim 17", "pretraining_tp 2"):
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        found[name] = attributes.outcome(changes[name], folder)
    assert set(found.values()) <= {"equal", "refused", "not built"}, found
    assert found["attention_bias True"] == found["hidden_act relu"] == "equal"
