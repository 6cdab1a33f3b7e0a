"""Disguised checkpoints: configs and tokenizers follow the weights, and transformers computes the same with them."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from cases import slow
from make_golden import hf_model, hf_outputs
from parity_cases import CASES, GOLDEN, Case

from tracing_jax import cli
from tracing_jax.arch import UnsupportedModelError, read_arch
from tracing_jax.checkpoint import CheckpointError, open_checkpoint, permutable_token_ids, save_checkpoint
from tracing_jax.checkpoint.token_ids import permute_token_ids
from tracing_jax.data import load_tokenizer
from tracing_jax.forward import check_function
from tracing_jax.rewrites import DISGUISES, IdentityLayer, Padding, Renaming, arch_after, draw_rewrites
from tracing_jax.sources import in_memory, rewritten
from tracing_jax.tree import flatten

HF_TOLERANCE = 5e-4  # of the larger of 1 and the largest logit; float32 on both sides, and weights rounded once more
TEXT = "The tokens of a disguised model have other ids: 0123456789, \N{LATIN SMALL LETTER E WITH ACUTE}, and spaces.  "
WRITTEN = [name for name in CASES if name.endswith("gqa-tied-default")] + [
    "gpt2-tied", "gpt2-inner", "mixtral-one_per_token",
    "llama-mha-untied-llama3", "llama-both_biases", "llama-narrow_heads", "mistral-mqa-tied-linear",
    "qwen2-window_from_layer_1", "qwen2-layer_types", "gemma2-layer_types", "gemma3_text-pattern_2", "olmo-no_clip",
    "smollm3-windows", "cohere-qk_norm", "glm4-bias", "gpt_neox-tied", "stablelm-parallel", "phi-qk_norms",
    "gptj-tied", "opt-tied", "falcon-multi_query", "falcon-grouped", "bloom-odd_heads", "gpt_bigcode-multi_query",
    "ernie4_5-biases", "seed_oss-biases", "phi3-longrope_partial",
]  # fmt: skip

# One of each family with experts; two in the default run, which between them have all that the others have.
_MIXTURES = sorted(case.name for case in GOLDEN["parity_mixtures"])
WRITTEN += [slow(case.name) for case in GOLDEN["parity_hybrids"]]
WRITTEN += [name if name in ("qwen2_moe-every_other", "deepseek_v3-groups") else slow(name) for name in _MIXTURES]


def folder_of(case: Case, folder: Path) -> Path:
    """Writes the model of a case as a checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    save_checkpoint(folder / "whole", case.source(), companions=folder)
    return folder / "whole"


def write_disguised(case, tmp_path):
    """Writes a case with all rewrites but the one of tokens, and returns the original, the rewrites and the source."""
    original = open_checkpoint(str(folder_of(case, tmp_path / "hf")))
    rewrites = draw_rewrites("all", jax.random.key(5), original.arch, without=("rename",))
    source = in_memory(rewritten(original, rewrites))
    save_checkpoint(tmp_path / "disguised", source, companions=original.folder)
    return original, rewrites, source


@pytest.mark.parametrize("name", WRITTEN)
def test_written_config_says_what_the_model_became(name, tmp_path):
    original, rewrites, source = write_disguised(CASES[name], tmp_path)
    written = open_checkpoint(str(tmp_path / "disguised"))
    assert written.arch == arch_after(rewrites, original.arch) != original.arch
    leaves, expected = flatten(in_memory(written).params), flatten(source.params)
    assert all(np.array_equal(leaves[name], leaf) for name, leaf in expected.items())


@pytest.mark.torch
@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_computes_the_same_logits_from_the_written_checkpoint(name, tmp_path):
    from transformers import AutoModelForCausalLM

    case = CASES[name]
    write_disguised(case, tmp_path)
    tokens = case.tokens()
    before, _ = hf_outputs(hf_model(case), tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "disguised", attn_implementation="eager", dtype="float32")
    after, _ = hf_outputs(loaded.eval(), tokens)
    assert np.abs(after - before).max() <= HF_TOLERANCE * max(1.0, np.abs(before).max())


def test_fields_that_need_not_change_keep_their_old_names(tmp_path):
    case = CASES["llama-gqa-untied-default"]
    folder = folder_of(case, tmp_path / "hf")
    old = json.loads((folder / "config.json").read_text())
    del old["rope_parameters"], old["head_dim"]
    old |= {"rope_theta": 777.0, "hidden_size": 32, "custom": None}
    (folder / "config.json").write_text(json.dumps(old))
    source = rewritten(tiny.model(read_arch(folder)), [Padding(units=2), IdentityLayer(0)])
    save_checkpoint(tmp_path / "disguised", source, companions=folder)
    new = json.loads((tmp_path / "disguised" / "config.json").read_text())
    assert new == old | {"intermediate_size": 42, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        ("llama-gqa-untied-default", {"residual_scale": 0.5}, "residual_scale 0.5, which reads back as 1.0"),
        ("qwen2-layer_types", {"layer_windows": (9, None)}, "no layer_types"),
    ],
)
def test_a_config_that_cannot_say_what_the_model_became_is_refused(name, facts, message, tmp_path):
    folder, source = folder_of(CASES[name], tmp_path / "hf"), CASES[name].source()
    with pytest.raises(UnsupportedModelError, match=message):
        save_checkpoint(tmp_path / "out", replace(source, arch=replace(source.arch, **facts)), companions=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disguise_on_the_command_line_keeps_the_function_and_the_text(family, tmp_path, capsys):
    base = family.member("base")
    cli.main(["disguise", str(base), "--disguise=all", "--seed=3", f"--save={tmp_path / 'out'}"])
    said = capsys.readouterr().out
    assert f"rewrites: {', '.join(name for name in DISGUISES if name != 'means')}" in said
    assert "num_layers: 2 -> 3" in said
    before, after = open_checkpoint(str(base)), open_checkpoint(str(tmp_path / "out"))
    assert after.arch.num_layers == 3
    old, new = load_tokenizer(base), load_tokenizer(tmp_path / "out")
    ids, new_ids = (tokenizer(TEXT)["input_ids"] for tokenizer in (old, new))
    assert ids != new_ids
    assert new.decode(new_ids) == old.decode(ids) == TEXT
    renamed = np.asarray([new.get_vocab()[token] for token in old.convert_ids_to_tokens(range(len(old)))], np.int32)
    assert np.array_equal(renamed[ids], new_ids)
    assert check_function(before, after, seed=1, new_ids=renamed) < 1e-4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--disguise=twist"], "twist is none of"),
        (["--disguise="], "no rewrite is asked for"),
        (["--disguise=rotate", "--save=."], "is there already"),
    ],
)
def test_errors_of_the_command_line_are_one_message(argv, message, tmp_path, family):
    asked = ["disguise", str(family.member("base")), f"--save={tmp_path / 'out'}", *argv]
    with pytest.raises(SystemExit, match=message):
        cli.main(asked)
    assert not list(tmp_path.iterdir())


def test_a_rewrite_that_does_not_exist_ends_the_command_with_the_reason(tmp_path):
    folder = folder_of(CASES["olmo2-gqa-untied-default"], tmp_path / "hf")
    with pytest.raises(SystemExit, match="means: its norms do not subtract the mean"):
        cli.main(["disguise", str(folder), "--disguise=permute,means", f"--save={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match=r"no tokenizer\.json"):
        cli.main(["disguise", str(folder), "--disguise=rename", f"--save={tmp_path / 'out'}"])


def _tokenizer_folder(folder: Path, model, **files) -> Path:
    """Writes a folder with a tokenizer, special tokens and the configs that name them."""
    from tokenizers import AddedToken, Tokenizer, processors

    folder.mkdir()
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    tokenizer.post_processor = processors.Sequence([processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )])  # fmt: skip
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("</s>"), pad_token="</s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    return folder


def _models():
    from tokenizers import models

    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab"]
    return {
        "BPE": models.BPE({word: i for i, word in enumerate(words)}, [("a", "b")], unk_token="<unk>"),
        "WordLevel": models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"),
        "Unigram": models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0),
    }


@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "Unigram"])
def test_tokenizers_of_every_kind_give_renamed_ids(kind, tmp_path):
    from tokenizers import Tokenizer

    files = {
        "config": {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None, "vocab_size": 9},
        "generation_config": {"eos_token_id": 2, "suppress_tokens": [3, 4]},
        "tokenizer_config": {"added_tokens_decoder": {"1": {"content": "<s>"}, "7": {"content": "<extra>"}}},
        "added_tokens": {"<extra>": 7},
    }
    folder = _tokenizer_folder(tmp_path / "hf", _models()[kind], **files)
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = permutable_token_ids(folder)
    assert ids.tolist() == list(range(7))
    new_ids = Renaming(np.asarray([4, 2, 6, 0, 3, 1, 5, 7, 8], np.int32)).new_ids
    permute_token_ids(folder, new_ids)
    after = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {token: int(new_ids[i]) for token, i in before.get_vocab().items()} == after.get_vocab()
    for text in ("abc", "ab<extra>c</s>z", "cab"):
        assert after.encode(text).ids == new_ids[before.encode(text).ids].tolist()
        assert after.encode(text).tokens == before.encode(text).tokens
    config, generation, tokenizer, added = (json.loads((folder / f"{name}.json").read_text()) for name in files)
    assert config == {"bos_token_id": 5, "eos_token_id": [1, 7], "pad_token_id": None, "vocab_size": 9}
    assert generation == {"eos_token_id": 1, "suppress_tokens": [4, 0]}
    assert tokenizer["added_tokens_decoder"] == {"5": {"content": "<s>"}, "7": {"content": "<extra>"}}
    assert added == {"<extra>": 7}
    assert not (folder / "tokenizer.model").exists()  # it would still say the old ids


def test_tokens_added_behind_the_vocabulary_keep_their_ids(tmp_path):
    folder = _tokenizer_folder(tmp_path / "hf", _models()["BPE"])
    with pytest.raises(CheckpointError, match="only the 7 tokens"):
        permute_token_ids(folder, np.asarray([1, 0, 2, 3, 4, 5, 6, 8, 7], np.int32))
