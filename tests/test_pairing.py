"""Two tokenizers on one text: paired positions have read the same bytes; samples are drawn evenly from the pairs."""

import re

import numpy as np
import pytest
from test_data import TEXT, byte_level, sentencepiece_like

from tracing_jax.data import Documents, paired_beginnings, paired_on_bytes, paired_one_to_one, token_blocks
from tracing_jax.statistics import Vocabularies


def documents(text=TEXT):
    return Documents(text, {"dataset": "test"})


def ends_of(tokenizer, text):
    """Returns the number of characters that each token of a text has brought the reader to."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return np.maximum.accumulate([end for _, end in offsets])


@pytest.mark.parametrize("makers", [(byte_level, sentencepiece_like), (sentencepiece_like, byte_level)])
def test_paired_positions_have_read_the_same_characters(makers):
    base, ft = (make() for make in makers)
    found = paired_on_bytes(documents(), base, ft, block_size=24, num_tokens=24 * 8)
    own = token_blocks(documents(), base, block_size=24, num_tokens=24 * 8)
    np.testing.assert_array_equal(found.base, own.tokens)
    with_bos = [int(make is sentencepiece_like) for make in makers]
    ends = ends_of(base, TEXT)
    width, start = 24 - with_bos[0], 0
    for n in range(len(found.base)):
        stop = ends[(n + 1) * width - 1]
        theirs = ends_of(ft, TEXT[start:stop]) + start
        at_base, at_ft = found.at_base[n][found.valid[n]], found.at_ft[n][found.valid[n]]
        read_base = ends[n * width + at_base - with_bos[0]]
        np.testing.assert_array_equal(read_base, theirs[at_ft - with_bos[1]])
        assert (np.diff(read_base) > 0).all()
        start = stop
    assert found.num_pairs > len(found.base)
    assert not found.is_whole


def test_the_same_tokenizer_pairs_every_position_that_ends_a_character():
    tokenizer = byte_level()
    found = paired_on_bytes(documents("plain words " * 40), tokenizer, tokenizer, block_size=16, num_tokens=64)
    np.testing.assert_array_equal(found.at_base[found.valid], found.at_ft[found.valid])


def test_a_text_without_a_whole_block_is_refused():
    with pytest.raises(ValueError, match="no whole block of 4096 tokens"):
        paired_on_bytes(documents(), byte_level(), byte_level(), block_size=4096, num_tokens=4096)


def test_a_sample_is_part_of_the_pairs_and_as_large_as_asked():
    ids = np.arange(60, dtype=np.int32).reshape(6, 10)
    blocks = paired_one_to_one(ids, ids)
    assert blocks.is_whole
    for count in (3, 6, 20, 600):
        few = blocks.sampled(count, np.random.default_rng(0))
        assert few.num_pairs == min(count // 6 * 6 if count >= 6 else count, 60)
        drawn = list(zip(*np.nonzero(few.valid)))
        places = {(n, int(few.at_base[n, p])) for n, p in drawn}
        assert len(places) == len(drawn)
    blocks.valid.flags.writeable = True
    blocks.valid[2] = False
    few = blocks.sampled(60, np.random.default_rng(0))
    assert few.num_pairs == 50
    assert not few.valid[2].any()


def test_beginnings_of_lines_are_paired_where_both_have_read_the_same():
    """Words of one tokenizer, letters of the other: they end together where a word ends."""
    text = "\n".join(" ".join(["word"] * 40 + ["x" * i]) for i in range(1, 30))

    def by(split):
        def tokenizer(piece, **_):
            offsets = [match.span() for match in re.finditer(split, piece)]
            return {"input_ids": [end % 50 for _, end in offsets], "offset_mapping": offsets}

        return tokenizer

    words, letters = by(r"\S+\s?"), by(r".")
    same = paired_beginnings(text, words, words, 4, 24)
    assert same.is_whole
    assert same.base.shape == (4, 24)
    mixed = paired_beginnings(text, words, letters, 4, 24)
    assert mixed.num_pairs == 4 * 4  # 24 letters are four words of five with their spaces
    for block, place in zip(*np.nonzero(mixed.valid)):
        assert 5 * (mixed.at_base[block, place] + 1) == mixed.at_ft[block, place] + 1
    assert paired_beginnings("short", words, words, 4, 24) is None


def test_tokens_that_are_compared_tell_runs_apart():
    """A tokenizer that changed since a run was interrupted must not continue it."""
    ids = np.arange(200, dtype=np.int32)
    every = Vocabularies(True, ids, ids, in_text=ids < 100)
    others = [
        Vocabularies(True, ids, ids),
        Vocabularies(True, ids, ids[::-1], in_text=ids < 100),
        Vocabularies(True, ids, ids, in_text=ids < 101),
        Vocabularies(True, ids, ids, in_text=ids < 100, unseen={"bytes": (ids[150:], ids[150:])}),
    ]
    assert every.digest() == Vocabularies(True, ids.copy(), ids.copy(), in_text=ids < 100).digest()
    others.append(Vocabularies(True, ids, ids, in_text=ids < 100, text_blocks=paired_one_to_one(ids[None], ids[None])))
    assert len({every.digest(), *(other.digest() for other in others)}) == 6
