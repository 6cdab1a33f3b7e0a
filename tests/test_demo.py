"""The demo family at a size that trains in seconds: what was learnt, what the cache promises, what is refused."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from tracing_jax import demo
from tracing_jax.checkpoint import load, open_checkpoint
from tracing_jax.data import load_tokenizer, read_documents, token_blocks
from tracing_jax.forward import logits, path_losses
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.tree import flatten

_GROUPS = ("mlp", "norm", "attn", "emb")
_TINIEST = demo.DemoSizes(
    vocab_size=300, embed_dim=16, num_layers=1, mlp_dim=16, block_size=16, base_steps=4, finetune_steps=2,
    base_pieces=32, finetune_pieces=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiniest(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoModels:
    return demo.family(str(tmp_path_factory.mktemp("cache")), _TINIEST)


@pytest.fixture(scope="module")
def members(family: demo.DemoModels) -> dict[str, InMemory]:
    return {name: load(open_checkpoint(str(family.member(name))), make_mesh()) for name in demo.MEMBERS}


@pytest.fixture(scope="module")
def tokens(family: demo.DemoModels) -> np.ndarray:
    tokenizer = load_tokenizer(family.member("base"))
    return token_blocks(read_documents(str(family.text)), tokenizer, block_size=64).tokens[:64]


def losses_along(members: dict[str, InMemory], ft: str, tokens: np.ndarray) -> np.ndarray:
    compute = Compute(make_mesh(), batch_size=64)
    return path_losses(members["base"], members[ft], tokens, (0.0, 0.5, 1.0), _GROUPS, compute).mean((1, 2))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_models_have_learnt_from_context(members, tokens):
    losses = {name: losses_along(members, name, tokens)[-1] for name in demo.MEMBERS}
    # The entropy of the tokens' own frequencies is a bound that no model blind to context can pass.
    assert max(losses.values()) < demo.unigram_entropy(tokens) - 0.1, losses


@pytest.mark.slow
def test_finetune_is_better_on_its_own_text(family, members):
    _, held_out = demo.split(demo.finetune_text(), 200)
    tokenizer = load_tokenizer(family.member("finetune"))
    ids = tokenizer("".join(held_out), add_special_tokens=False, verbose=False)["input_ids"]
    base, _, finetune = losses_along(members, "finetune", np.asarray(ids[: 32 * 64], np.int32).reshape(32, 64))
    assert finetune < base - 0.05


def test_only_the_path_to_the_finetune_is_flat(members, tokens):
    for name in demo.MEMBERS[1:]:
        base, middle, ft = losses_along(members, name, tokens)
        barrier = middle - (base + ft) / 2
        assert barrier < 0.05 if name == "finetune" else barrier > 0.3, name


def test_disguised_is_the_finetune_with_its_units_moved(members, tokens):
    finetune, disguised = members["finetune"], members["disguised"]
    np.testing.assert_allclose(logits(disguised, tokens[:4]), logits(finetune, tokens[:4]), rtol=0, atol=1e-4)
    for name, leaf in flatten(disguised.params).items():
        other = flatten(finetune.params)[name]
        assert not np.array_equal(leaf, other), name
        np.testing.assert_array_equal(np.sort(leaf, axis=None), np.sort(other, axis=None))


def test_independent_shares_no_weights_with_base(members):
    for name, leaf in flatten(members["independent"].params).items():
        if leaf.ndim > 1:
            correlation = np.corrcoef(np.ravel(leaf), np.ravel(flatten(members["base"].params)[name]))[0, 1]
            assert abs(correlation) < 0.2, name


def test_tokenizer_gives_any_text_back(family):
    tokenizer = load_tokenizer(family.member("independent"))
    for text in (family.text.read_text("utf-8"), " naïve  漢字 🦊\r\n\t\x00 end ", "don 't , a . b"):
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text


def test_family_is_whole_and_alone_in_its_cache(tiniest):
    assert list(tiniest.folder.parent.iterdir()) == [tiniest.folder]
    assert {path.name for path in tiniest.folder.iterdir()} == {*demo.MEMBERS, "text.txt"}
    with pytest.raises(ValueError, match="it has base, finetune"):
        tiniest.member("cousin")


def test_second_call_trains_nothing(tiniest, monkeypatch):
    monkeypatch.setattr("tracing_jax.demo.members._build", lambda *_: pytest.fail("trained again"))
    assert demo.family(str(tiniest.folder.parent), _TINIEST) == tiniest


def test_default_cache_follows_xdg(tiniest, tmp_path, monkeypatch):
    monkeypatch.setattr("tracing_jax.demo.members._build", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.family(recipe=_TINIEST).folder == tmp_path / "tracing_jax" / tiniest.folder.name


def test_same_recipe_gives_the_same_bytes_and_another_seed_others(tiniest, tmp_path):
    again = demo.family(str(tmp_path), _TINIEST)
    assert again.folder.name == tiniest.folder.name
    assert files_of(again.folder) == files_of(tiniest.folder)
    other = demo.family(str(tmp_path), dataclasses.replace(_TINIEST, seed=1))
    assert files_of(other.folder)["base/model.safetensors"] != files_of(again.folder)["base/model.safetensors"]


def test_no_paragraph_is_both_seen_and_held_out():
    seen, held_out = demo.split(demo.base_text(), 160)
    paragraphs = [set("".join(pieces).split("\n\n")) - {""} for pieces in (seen, held_out)]
    assert len(held_out) == 10
    assert not paragraphs[0] & paragraphs[1]


def test_killed_run_leaves_nothing(tmp_path, monkeypatch):
    def killed(work: Path, recipe: demo.DemoSizes) -> None:
        (work / "base").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("tracing_jax.demo.members._build", killed)
    with pytest.raises(KeyboardInterrupt):
        demo.family(str(tmp_path), _TINIEST)
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_at_once_the_first_to_finish_provides_the_family(tiniest, tmp_path, monkeypatch):
    def overtaken(work: Path, recipe: demo.DemoSizes) -> None:
        (work / "text.txt").write_text("ours")
        (tmp_path / tiniest.folder.name).mkdir()
        (tmp_path / tiniest.folder.name / "text.txt").write_text("theirs")

    monkeypatch.setattr("tracing_jax.demo.members._build", overtaken)
    family = demo.family(str(tmp_path), _TINIEST)
    assert family.text.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [family.folder]


def test_python_without_the_language_reference_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pydoc_data\.topics .* stripped"):
        demo.family(str(tmp_path), _TINIEST)
