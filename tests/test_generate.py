"""Generated text: what a cache remembers changes nothing, samples belong to themselves, files say what was drawn."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import hf_model
from parity_cases import CASES

import tracing_jax as tj
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.forward import logits
from tracing_jax.generation import (
    Sampler,
    SamplingParams,
    filtered,
    generate_texts,
    prompt_tokens,
    read_prompts,
    sample,
)
from tracing_jax.generation.texts import _following
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import in_memory, sharded

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16], [3]]
LENGTH = 17  # the first token, and one program of sixteen
LLAMA = next(name for name in CASES if name.startswith("llama-gqa"))


def facts_of_a_cache(arch):
    """Returns what of an architecture can make the logits of a token read from a cache differ from those in a text."""
    return {
        "latent": arch.latent is not None, "windows": any(arch.layer_windows), "chunks": any(arch.layer_chunks),
        "sinks": arch.sinks, "learned positions": arch.num_positions is not None, "offset": arch.position_offset > 0,
        "no rope": not arch.rope_frequencies, "two ropes": len(arch.rope_frequencies) > 1, "alibi": arch.alibi_slopes,
        "interleaved rope": arch.rope_interleaved, "temperature": arch.temperature is not None,
        "experts": arch.num_experts is not None, "shared expert": arch.shared_mlp_dim is not None,
        "parallel": arch.parallel, "norms of queries": arch.qk_norm is not None, "soft cap": arch.attention_softcap,
        "rope of a length": arch.rope_positions is not None, "embedding norm": arch.embed_norm, "clip": arch.clip_qkv,
        "delta net": arch.delta_net is not None, "mamba": arch.mamba is not None, "gated heads": arch.head_gate,
        "shared keys": arch.shares_keys, "two widths": arch.global_attn is not None,
        "per-layer embeddings": arch.per_layer_dim is not None,
    }  # fmt: skip


def cover():
    """Yields the names of cases that between them have every such fact; what else differs is tested by their logits."""
    facts = {
        name: {fact for fact, there in facts_of_a_cache(case.arch()).items() if there} for name, case in CASES.items()
    }
    left, name = set().union(*facts.values()), LLAMA
    while True:
        yield name
        left -= facts[name]
        if not left:
            return
        name = max(facts, key=lambda name: len(facts[name] & left))


COVER = list(cover())


def sampler(name, choice, batch_size=4, mesh=None, **fields):
    mesh = mesh or make_mesh()
    return Sampler(in_memory(sharded(CASES[name].source(), mesh)), Compute(mesh, batch_size), choice, **fields)


def written(*args, prompts=PROMPTS, length=LENGTH, **fields):
    found = dict(sampler(*args, **fields).sample(prompts, length))
    return [found[i] for i in range(len(prompts))]


def greedy(name):
    """Returns the tokens after each prompt, as many as the model has positions for."""
    length = min(LENGTH, (CASES[name].arch().longest or 2 * LENGTH) - max(map(len, PROMPTS)))
    return written(name, SamplingParams(temperature=0.0), length=length)


@pytest.mark.slow
@pytest.mark.parametrize("name", COVER)
def test_greedy_tokens_are_those_of_the_whole_text(name):
    found, longest = greedy(name), max(map(len, PROMPTS))
    # All at once, in one program: what follows a text does not change what is predicted in it.
    texts = [prompt + tokens + [0] * (longest - len(prompt)) for prompt, tokens in zip(PROMPTS, found, strict=True)]
    best = logits(CASES[name].source(), np.asarray(texts, np.int32)).argmax(-1)
    for row, prompt, tokens in zip(best, PROMPTS, found, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 : len(prompt) - 1 + len(tokens)], tokens)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", COVER)
def test_greedy_tokens_are_those_of_transformers(name):
    import torch

    model = hf_model(CASES[name])
    # Token by token, transformers 5.24 leaves out the least step of Mamba-2, which it has for a text.
    model.generation_config.use_cache = CASES[name].arch().mamba is None
    for prompt, tokens in zip(PROMPTS, greedy(name), strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=len(tokens), do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert theirs[0, len(prompt) :].tolist() == tokens


@pytest.mark.slow
def test_sample_follows_from_its_number_and_not_from_its_batch():
    name, choice = LLAMA, SamplingParams(temperature=0.9, top_k=20, top_p=0.95)
    prompts = PROMPTS * 3
    together = written(name, choice, 16, seed=4, prompts=prompts)
    apart = written(name, choice, 2, seed=4, prompts=prompts)
    assert together == apart
    assert together[0] != together[3]  # the same prompt, another number
    assert together != written(name, choice, 16, seed=5, prompts=prompts)
    assert together == written(name, choice, 16, mesh=make_mesh(2, 2), seed=4, prompts=prompts)


@pytest.mark.slow
def test_text_ends_at_the_token_that_ends_it():
    name = LLAMA
    whole = written(name, SamplingParams(temperature=0.0))
    end = whole[0][4]
    found = written(name, SamplingParams(temperature=0.0), ends=(end,))
    for cut, tokens in zip(found, whole, strict=True):
        at = tokens.index(end) + 1 if end in tokens else len(tokens)
        assert cut == tokens[:at]


@pytest.mark.torch
@pytest.mark.parametrize(
    "choice",
    [SamplingParams(0.7), SamplingParams(1.3, top_k=5), SamplingParams(1.0, top_p=0.6), SamplingParams(0.8, 7, 0.9)],
)
def test_filters_leave_what_those_of_transformers_leave(choice):
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rows = np.random.default_rng(0).standard_normal((8, 31)).astype(np.float32) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(choice.temperature)])
    warpers += [TopKLogitsWarper(choice.top_k)] if choice.top_k else []
    warpers += [TopPLogitsWarper(choice.top_p)] if choice.top_p < 1 else []
    theirs = warpers(torch.zeros(8, 1, dtype=torch.long), torch.tensor(rows)).numpy()
    np.testing.assert_allclose(filtered(jnp.asarray(rows), choice), theirs, rtol=1e-5)


@pytest.mark.slow
def test_tokens_are_drawn_with_their_probabilities():
    row = jnp.asarray([2.0, 1.0, 0.0, -1.0, -2.0])
    choice, draws = SamplingParams(temperature=0.8, top_p=0.95), 20000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(draws))
    drawn = sample(jnp.tile(row, (draws, 1)), keys, jnp.zeros(draws, jnp.int32), choice)
    wanted = np.exp(row / 0.8) / np.exp(row / 0.8).sum()
    kept = np.cumsum(wanted) - wanted < 0.95
    wanted = np.where(kept, wanted, 0) / wanted[kept].sum()
    shares = np.bincount(drawn, minlength=5) / draws
    assert not shares[~kept].any()
    np.testing.assert_allclose(shares, wanted, atol=4 * np.sqrt(0.25 / draws))


@pytest.mark.slow
def test_program_writes_prompts_texts_tokens_and_seed(family, tmp_path):
    (tmp_path / "prompts.txt").write_text("The list\nA module\n")
    flags = [f"--models={family.member('base')}", f"--prompts={tmp_path}/prompts.txt", f"--save={tmp_path}"]
    command = [sys.executable, "generate.py", *flags, "--max_new_tokens=8", "--seed=3", "--temperature=0.9"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip())
    assert file == tmp_path / "base_gentext.json"
    rows = json.loads(file.read_text("utf-8"))
    assert [row["prompt"] for row in rows] == ["The list", "A module"]
    assert all(row["seed"] == 3 and len(row["tokens"]) == 8 and isinstance(row["text"], str) for row in rows)


@pytest.mark.slow
def test_texts_without_prompts_begin_with_tokens_of_their_own_where_there_is_no_bos(family, tmp_path):
    model, compute = open_checkpoint(str(family.member("base"))), Compute(make_mesh(), 4)
    file = generate_texts(model, 3, tmp_path / "texts.json", compute, SamplingParams(0.9), max_new_tokens=8)
    assert len({row["prompt"] for row in json.loads(file.read_text("utf-8"))}) > 1


@dataclasses.dataclass
class TokenizerThatDropsTheFirstSpace:
    """As those of SentencePiece: words, the first decoded without the space before it; 0 is BOS."""

    words: tuple[str, ...] = ("<s>", " Once", " upon", " a", " time")

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(self.words[token] for token in tokens if token).removeprefix(" ")


def test_prompt_and_text_are_the_whole_text():
    tokenizer = TokenizerThatDropsTheFirstSpace()
    assert _following(tokenizer, [0, 1, 2], [3, 4]) == " a time"
    assert _following(tokenizer, [0], [1, 2]) == "Once upon"


@pytest.mark.parametrize("prompts", [["The list"], 2])
def test_texts_longer_than_the_model_can_read_are_refused(family, prompts):
    model = open_checkpoint(str(family.member("base")))
    short = dataclasses.replace(model, arch=dataclasses.replace(model.arch, num_positions=16))
    with pytest.raises(ValueError, match=r"16 positions.*fewer max_new_tokens"):
        prompt_tokens(short, prompts, 16, seed=0)


@pytest.mark.parametrize(
    ("given", "expected_message"),
    [
        (["--models=a/b", "--num_samples=1", "--seed=4294967296"], "seed"),
        (["--models=a/b"], "give --prompts=FILE, or --num_samples=N"),
    ],
)
def test_program_refuses_with_one_message(tmp_path, given, expected_message):
    command = [sys.executable, "generate.py", *given, f"--save={tmp_path}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert expected_message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_seeds_reach_as_far_as_those_of_runs():
    name, choice = LLAMA, SamplingParams(temperature=0.9)
    assert written(name, choice, seed=2**32 - 1) != written(name, choice, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "one\n\ntwo\n", ["one", "two"]),
        ("a.json", '["one", {"prompt": "two"}]', ["one", "two"]),
        ("a.jsonl", '{"prompt": "one"}\n"two"\n', ["one", "two"]),
        ("b.json", "[1]", None),
        ("b.json", '[{"text": "x"}]', None),
        ("b.csv", "x", None),
        ("b.txt", "\n", None),
    ],
)
def test_prompts_are_read_or_refused(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content)
    if prompts is None:
        with pytest.raises(ValueError, match=name):
            read_prompts(tmp_path / name)
    else:
        assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("prompts", "settings", "named"),
    [
        (["a"], {"temperature": -1, "top_k": -1, "top_p": 0.0, "max_new_tokens": 0, "seed": -1},
         ["temperature=-1", "top_k=-1", "top_p=0.0", "max_new_tokens=0", "seed=-1"]),
        (["a"], {"temperature": float("nan")}, ["temperature=nan"]),
        ("a text", {}, ["'a text'", "a list of texts"]),
        (["a", ""], {}, ["none of them empty"]),
        ([], {}, ["at least one"]),
    ],
)  # fmt: skip
def test_generation_refuses_what_it_cannot_do(family, prompts, settings, named):
    with pytest.raises(ValueError, match=named[0]) as error:
        tj.generate(family.member("base"), prompts, **settings)
    assert all(part in str(error.value) for part in named)


def test_token_without_an_embedding_is_refused(family):
    model = open_checkpoint(str(family.member("base")))
    small = dataclasses.replace(model, arch=dataclasses.replace(model.arch, vocab_size=5))
    with pytest.raises(ValueError, match="there are 5 embeddings"):
        prompt_tokens(small, ["The list"], 4, 0)
