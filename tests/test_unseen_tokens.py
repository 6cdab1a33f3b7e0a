"""`unseen_tokens`: which tokens no text gives, and whether their rows are base's; exact, whatever the body."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from scipy.optimize import linear_sum_assignment
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tracing_jax.statistics.unseen_tokens as module
from tracing_jax import demo
from tracing_jax.data import unseen_tokens
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import Pair, Vocabularies, verdict
from tracing_jax.statistics.unseen_tokens import UnseenTokens

ARCH = tiny.llama_mha()
IDS = np.arange(61, dtype=np.int32)
UNSEEN = {"unreachable tokens": (IDS[40:53], IDS[40:53]), "rows without a token": (IDS[53:], IDS[53:])}
SAME = Vocabularies(True, IDS[:53], IDS[:53], unseen=UNSEEN)
BASE = tiny.model(ARCH, 0)


def pair_of(base, ft, vocabularies=SAME, seed=0):
    return Pair(base, ft, vocabularies, None, Compute(make_mesh(1, 1), 4), seed=seed)


def tuned(model, rows, noise=0.3):
    """A descendant: trained everywhere but on the unseen rows, which decay and, in the head, get a common push."""
    params = tiny.noisy(model.params, noise)
    for (part, name), axis in ((("embed", "embedding"), 0), (("head", "lm_head"), 1)):
        before = model.params[part][name] if axis == 0 else model.params[part][name]["kernel"]
        after = np.array(params[part][name] if axis == 0 else params[part][name]["kernel"])
        at = (slice(None),) * axis + (rows,)
        push = np.random.default_rng(5).normal(size=model.arch.embed_dim)
        after[at] = 0.8 * np.asarray(before)[at] + (push[:, None] if axis else 0)
        params[part][name] = jnp.asarray(after) if axis == 0 else {"kernel": jnp.asarray(after)}
    return InMemory(model.arch, params)


RELATED = tuned(BASE, IDS[40:])


def test_tokens_that_no_text_gives_are_those_of_bytes_and_of_rows_without_a_string():
    bpe = demo.train_tokenizer(demo.DemoSizes(vocab_size=300), ["some text, and some more of some such text"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    rows = len(tokenizer)
    ((name, (base, ft)),) = unseen_tokens(tokenizer, tokenizer, rows, rows).items()
    assert name == "unreachable tokens"
    np.testing.assert_array_equal(base, ft)
    assert sorted(tokenizer.convert_ids_to_tokens(base.tolist())) == sorted("ÀÁõö÷øùúûüýþÿ")
    text = "".join(map(chr, [*range(0x3000), *range(0xD000, 0xD800), *range(0x10000, 0x110000, 0x101)]))
    assert not set(base) & set(tokenizer(text, add_special_tokens=False)["input_ids"])
    padded = unseen_tokens(tokenizer, tokenizer, rows + 7, rows + 5)
    np.testing.assert_array_equal(padded["rows without a token"][0], rows + np.arange(5))


def with_byte_fallback(extra=()):
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "abb", *extra]
    bpe = models.BPE({t: i for i, t in enumerate(vocab)}, [("a", "b")], unk_token="<unk>", byte_fallback=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>", "<unused1>", "<user>"]})
    return tokenizer


def test_with_byte_fallback_characters_that_have_a_token_never_give_their_byte():
    one, other = with_byte_fallback(), with_byte_fallback(extra=("z",))
    found = unseen_tokens(one, other, 999, 999)
    names = [one.convert_ids_to_tokens(ids.tolist()) for ids, _ in found.values()]
    invalid = [f"<0x{byte:02X}>" for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]
    assert names[0] == sorted(["<0x61>", "<0x62>", "abb", *invalid])  # not that of z, which only one of them has
    assert names[1] == ["<unused1>", "<|reserved_special_token_0|>"]
    for base, ft in list(found.values())[:2]:
        assert one.convert_ids_to_tokens(base.tolist()) == other.convert_ids_to_tokens(ft.tolist())
    assert not set(found["unreachable tokens"][0]) & set(one("ab abb\x00\ufffdéz")["input_ids"])
    assert list(found["rows without a token"][0]) == list(range(len(other), 999))


def test_a_vocabulary_without_bytes_has_no_such_tokens():
    words = Tokenizer(models.WordLevel({"À": 0, "ÿ": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert unseen_tokens(tokenizer, tokenizer, 3, 3) == {}


def independent(i):
    """Independent models in which some unseen rows repeat, are zero, or stand out, at the same places in both."""
    pair = []
    for side in (0, 1):
        params = tiny.params_of(ARCH, 1000 + 2 * i + side)
        table = np.array(params["embed"]["embedding"])
        table[44] = table[43]
        table[50] *= 9
        table[55:57] = 0
        pair.append(InMemory(ARCH, params | {"embed": {"embedding": jnp.asarray(table)}}))
    return pair


@pytest.mark.slow
def test_p_values_of_independent_models_are_uniform():
    ranks, agreeing = [], []
    for i in range(30):
        agreement, rank = UnseenTokens().compute(pair_of(*independent(i), seed=i)).tests
        ranks.append(rank.log10_ps)
        agreeing.append(agreement.values["agreeing"])
        assert agreement.places == [f"{part}, {group}" for part in ("embedding", "head") for group in UNSEEN]
    assert scipy.stats.kstest(10.0 ** np.array(ranks).ravel(), "uniform").pvalue > 0.01
    assert np.mean(agreeing) == pytest.approx(1, abs=4 / 120**0.5)  # of a random permutation, with variance 1


def test_rows_that_stay_are_found_whatever_was_trained():
    result = UnseenTokens().compute(pair_of(BASE, RELATED))
    agreement, rank = result.tests
    assert list(agreement.values["units"]) == list(agreement.values["agreeing"]) == [13, 8, 13, 8]
    floor = -math.log10(math.factorial(13))
    assert result.log10_p == agreement.log10_p == pytest.approx(floor + math.log10(4), abs=1e-3)
    assert not rank.decides
    judged = verdict({"unseen_tokens": result}, 1e-3)  # whoever has base can copy these rows, which do nothing
    assert (judged.verdict, list(judged.reservations)) == ("undecided", ["unseen_tokens"])
    assert "embedding" in result.label
    assert any("same seed" in note for note in result.notes)


def test_of_very_many_rows_some_are_drawn(monkeypatch):
    """A vocabulary of 256,000 with a tokenizer of 200,000 would take 25 GB."""
    monkeypatch.setattr(module, "MOST_ROWS", 10)
    result = UnseenTokens().compute(pair_of(BASE, RELATED))
    agreement = result.tests[0]
    assert list(agreement.values["units"]) == list(agreement.values["agreeing"]) == [10, 8, 10, 8]
    assert any("embedding, unreachable tokens: 10 rows; " in note for note in result.notes)


@pytest.mark.parametrize("name", ["rotate", "permute", "gains", "units", "values", "queries"])
def test_rewrites_change_nothing(name):
    after = in_memory(rewritten(RELATED, draw_rewrites(name, jax.random.key(7), ARCH)))
    hidden = InMemory(after.arch, jax.tree.map(jnp.asarray, after.params))
    given, found = (UnseenTokens().compute(pair_of(BASE, ft)) for ft in (RELATED, hidden))
    assert found.tests == given.tests


def test_the_matching_moves_with_the_rows_of_one_model():
    """Renaming tokens, and telling so, changes nothing; renaming them in secret leaves no row in place."""
    new_ids = np.concatenate([IDS[:40], np.roll(IDS[40:53], 1), np.roll(IDS[53:], 1)])
    order, params = np.argsort(new_ids), RELATED.params
    head = params["head"] | {"lm_head": {"kernel": params["head"]["lm_head"]["kernel"][:, order]}}
    moved = params | {"embed": {"embedding": params["embed"]["embedding"][order]}, "head": head}
    told = {group: (base, new_ids[ft]) for group, (base, ft) in UNSEEN.items()}
    hidden = InMemory(ARCH, moved)
    vocabularies = Vocabularies(False, IDS[:53], new_ids[:53], unseen=told)
    assert UnseenTokens().compute(pair_of(BASE, hidden, vocabularies)).headline == 1
    agreement = UnseenTokens().compute(pair_of(BASE, hidden)).tests[0]
    assert list(agreement.values["agreeing"]) == [0, 0, 0, 0]


def test_a_model_of_other_width_is_mapped_by_least_squares():
    kept = np.sort(np.random.default_rng(0).permutation(24)[:18])
    table = np.asarray(RELATED.params["embed"]["embedding"])[:, kept]
    narrow = InMemory(
        dataclasses.replace(ARCH, embed_dim=18, tied=True), {"embed": {"embedding": jnp.asarray(table)}, "head": {}}
    )
    for pair in (pair_of(BASE, narrow), pair_of(narrow, BASE)):
        result = UnseenTokens().compute(pair)
        assert result.tests[0].places == [f"embedding, {group}" for group in UNSEEN]
        assert result.headline == 1


def test_the_units_are_those_that_numpy_finds():
    ft = tuned(BASE, IDS[:0], noise=1.5)  # the unseen rows are trained too
    pair = pair_of(BASE, ft)
    gains = [np.asarray(m.params["head"]["norm"]["scale"], np.float64) for m in (BASE, ft)]
    heads = [np.asarray(m.params["head"]["lm_head"]["kernel"], np.float64).T * g for m, g in zip((BASE, ft), gains)]
    a, b = (rows[:40] - rows[:40].mean(0) for rows in heads)
    u, _, vt = np.linalg.svd(a.T @ b)
    a, b = (rows[40:53] - rows[40:53].mean(0) for rows in heads)
    a, b = (a @ u @ vt, b)
    cosines = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    expected = (linear_sum_assignment(cosines, maximize=True)[1] == np.arange(13)).sum()
    agreement = UnseenTokens().compute(pair).tests[0]
    place = agreement.places.index("head, unreachable tokens")
    assert (agreement.values["units"][place], agreement.values["agreeing"][place]) == (13, expected)


def test_the_body_does_not_matter_and_no_p_value_is_left_after_alignment():
    other = tiny.model(ARCH, 9)
    body = InMemory(ARCH, other.params | {part: RELATED.params[part] for part in ("embed", "head")})
    assert UnseenTokens().compute(pair_of(BASE, body)).headline == 1
    aligned = UnseenTokens().compute(dataclasses.replace(pair_of(BASE, RELATED), aligned=True))
    assert (aligned.log10_p, aligned.headline) == (None, 1)


def test_equal_rows_are_no_evidence():
    constant = []
    for model in (BASE, tiny.model(ARCH, 1)):
        params = jax.tree.map(jnp.asarray, model.params)
        table = params["embed"]["embedding"].at[40:].set(params["embed"]["embedding"][0])
        kernel = params["head"]["lm_head"]["kernel"].at[:, 40:].set(0.25)
        parts = {"embed": {"embedding": table}, "head": params["head"] | {"lm_head": {"kernel": kernel}}}
        constant.append(InMemory(ARCH, params | parts))
    result = UnseenTokens().compute(pair_of(*constant))
    assert (result.headline, result.log10_p, list(result.tests)) == (None, None, [])
    assert "can be distinguished" in result.p_reason


def test_what_does_not_apply_says_why():
    nothing = np.zeros(0, np.int32)
    for vocabularies, reason in (
        (Vocabularies(False, nothing, nothing, known=False), "tokenizer of a model is not known"),
        (Vocabularies(True, IDS, IDS), "no two tokens that no text holds"),
        (dataclasses.replace(SAME, ids_base=IDS[40:], ids_ft=IDS[40:]), "no ordinary tokens"),
    ):
        (line,) = UnseenTokens().not_applicable(ARCH, ARCH, vocabularies)
        assert reason in line
    assert UnseenTokens().not_applicable(ARCH, dataclasses.replace(ARCH, embed_dim=8), SAME) == []
