"""The benchmarks' checkpoint pairs are what they say: ft is base plus noise, permuted, and holes take no space."""

import numpy as np
import pytest
import transformers

from benchmarks.pairs import SHAPES, PairSpec, config_of, planted_permutations, write_pair
from tracing_jax.arch import arch_from_config
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.data import load_tokenizer
from tracing_jax.rewrites import Permutation, invert
from tracing_jax.sources import in_memory, rewritten
from tracing_jax.tree import flatten

_SIZES = {"vocab_size": 300, "num_hidden_layers": 3, "num_attention_heads": 6, "hidden_size": 24}
_LLAMA = {"intermediate_size": 40, "num_key_value_heads": 3, "head_dim": 4}
_CONFIGS = {
    "llama": transformers.LlamaConfig(**_SIZES | _LLAMA, dtype="bfloat16"),
    "gpt2": transformers.GPT2Config(**_SIZES | {"n_inner": 40, "n_positions": 64}, dtype="bfloat16"),
    "mixtral": transformers.MixtralConfig(
        **_SIZES | _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, dtype="bfloat16"
    ),
}


def _weights(source):
    return {name: np.asarray(leaf, np.float32) for name, leaf in flatten(in_memory(source).params).items()}


@pytest.mark.parametrize("family", _CONFIGS)
def test_ft_is_base_permuted_plus_noise(tmp_path, family):
    recipe = PairSpec(noise=0.1, permute=("embed", "mlp", "kv_heads", "q_group", "expert"), seed=3)
    write_pair(tmp_path / "pair", _CONFIGS[family], recipe)
    base, ft = (open_checkpoint(str(tmp_path / "pair" / member)) for member in ("base", "ft"))
    undone = invert(planted_permutations(base.arch, recipe), axis_table(base.arch))
    weights, found = _weights(base), _weights(rewritten(ft, [Permutation(undone)]))
    assert weights.keys() == found.keys()
    for name, leaf in weights.items():
        noise = found[name] - leaf
        if leaf.size < 300:
            continue
        assert np.std(leaf) == pytest.approx(0.02, rel=0.15), name
        assert np.std(noise) == pytest.approx(0.1 * 0.02, rel=0.15), name
        assert abs(np.corrcoef(noise.ravel(), leaf.ravel())[0, 1]) < 5 / leaf.size**0.5, name


def test_gains_are_near_their_neutral_value(tmp_path):
    write_pair(tmp_path / "pair", _CONFIGS["llama"], PairSpec())
    gains = _weights(open_checkpoint(str(tmp_path / "pair" / "ft")))["head/norm/scale"]
    assert gains == pytest.approx(1.0, abs=0.5)


def test_no_row_is_drawn_twice(tmp_path):
    """Rows of other units, layers and seeds are as unlike as independent ones."""
    rows = []
    for seed in (0, 1):
        write_pair(tmp_path / str(seed), _CONFIGS["llama"], PairSpec(permute=(), seed=seed))
        weights = _weights(open_checkpoint(str(tmp_path / str(seed) / "base")))
        rows += [weights[f"layers/{i}/mlp/{name}_proj/kernel"].T for i in range(3) for name in ("gate", "up")]
    together = np.concatenate(rows)
    cosines = np.corrcoef(together) - np.eye(len(together))
    assert np.abs(cosines).max() < 0.85  # 24 features, 115,000 pairs: 0.85 is nearly 6 standard errors of Fisher's z


def test_sparse_layers_are_holes_that_read_as_zeros(tmp_path):
    config = transformers.LlamaConfig(**_SIZES | _LLAMA | {"intermediate_size": 50_000}, dtype="bfloat16")
    write_pair(tmp_path / "pair", config, PairSpec(random_layers=1))
    for member in ("base", "ft"):
        folder = tmp_path / "pair" / member
        (file,) = folder.glob("*.safetensors")
        weights = _weights(open_checkpoint(str(folder)))
        empty = sum(leaf.nbytes // 2 for leaf in weights.values() if not leaf.any())
        assert {name for name, leaf in weights.items() if not leaf.any()} == {
            name for name in weights if name.startswith(("layers/1/", "layers/2/"))
        }
        assert empty > 0.6 * file.stat().st_size
        assert 512 * file.stat().st_blocks < file.stat().st_size - 0.9 * empty


def test_tokenizer_has_the_vocabulary_and_reads_any_text(tmp_path):
    write_pair(tmp_path / "pair", _CONFIGS["llama"], PairSpec())
    tokenizer = load_tokenizer(tmp_path / "pair" / "base")
    assert len(tokenizer) == 300
    ids = tokenizer("naïve 漢字", add_special_tokens=False)["input_ids"]
    assert max(ids) < 300
    assert tokenizer.decode(ids) == "naïve 漢字"


def test_shards_hold_what_the_index_says(tmp_path, monkeypatch):
    from benchmarks.pairs import sparse_shards, writing

    monkeypatch.setattr(writing, "allocate", lambda folder, shapes: sparse_shards.allocate(folder, shapes, 20_000))
    write_pair(tmp_path / "sharded", _CONFIGS["llama"], PairSpec())
    monkeypatch.undo()
    write_pair(tmp_path / "whole", _CONFIGS["llama"], PairSpec())
    assert len(list((tmp_path / "sharded" / "ft").glob("*.safetensors"))) > 2
    sharded, whole = (_weights(open_checkpoint(str(tmp_path / name / "ft"))) for name in ("sharded", "whole"))
    assert all(np.array_equal(sharded[name], leaf) for name, leaf in whole.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_model_that_we_know(shape):
    assert arch_from_config(config_of(shape)).num_layers == SHAPES[shape]["num_hidden_layers"]
    assert arch_from_config(config_of(shape, 2)).num_layers == 2


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor one of tiny"):
        config_of("llama9")
    small = transformers.LlamaConfig(**_SIZES | _LLAMA | {"vocab_size": 61})
    with pytest.raises(ValueError, match="vocab_size 61"):
        write_pair(tmp_path / "pair", small, PairSpec())
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        write_pair(tmp_path / "there", small, PairSpec())
