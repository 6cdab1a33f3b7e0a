"""Whole runs on a small trained family: what is found, what is written, and what is refused before anything is."""

import dataclasses
import json
import pickle
import shutil
import time
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest
import tiny
from cases import slow
from records import SCHEMA, outcomes
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config

import tracing_jax as tj
from tracing_jax import experiment, options
from tracing_jax.arch import UnsupportedModelError, read_arch
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.checkpoint import CheckpointError, save_checkpoint
from tracing_jax.cli.config_files import to_config
from tracing_jax.data import load_tokenizer, sample_documents
from tracing_jax.experiment import ConfigError, metadata, steps
from tracing_jax.experiment.inputs import open_inputs
from tracing_jax.experiment.memory import choose_placement
from tracing_jax.experiment.steps import IDENTICAL
from tracing_jax.experiment.validation import (
    fitted_to_shapes,
    make_statistics,
    statistic_names,
    too_costly,
    with_fitting_blocks,
)
from tracing_jax.options import STATISTICS, RunOptions
from tracing_jax.record import HashingStoppedError
from tracing_jax.report import summary
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sources import InMemory
from tracing_jax.statistics.calibration import DEFAULT_ALLOWANCE
from tracing_jax.tree import map_named


@pytest.fixture
def config_of(quick_config):
    """Returns a function that makes a config of two members of the family."""
    axes = "embed,mlp,kv_heads,q_group"

    def make(ft="finetune", base="base", **fields):
        return quick_config(ft=ft, base=base, **{"align_axes": axes, "permute_axes": axes} | fields)

    return make


def curves(record):
    sides = record["statistics"]["mode"]
    return sides["non_aligned"]["curve"], (sides["aligned"] or {}).get("curve")


@pytest.mark.slow
def test_a_finetune_is_joined_to_its_base_by_a_flat_path(config_of):
    before, _ = curves(experiment.trace(config_of()))
    assert before["barrier"] < 0.05
    assert before["end_loss_ft_own"] == pytest.approx(before["loss"][-1], abs=1e-4)


@pytest.mark.slow
def test_an_independent_model_is_behind_a_barrier_that_alignment_does_not_remove(config_of):
    before, after = curves(experiment.trace(config_of("independent", align=True)))
    assert before["barrier"] > 0.3
    assert after["barrier"] > 0.2


@pytest.mark.parametrize("evidence", ["weights", slow("activations")])
def test_a_disguised_finetune_is_aligned_back_until_its_path_is_flat_again(config_of, evidence):
    record = experiment.trace(config_of("disguised", align=True, align_evidence=evidence))
    flat, _ = curves(experiment.trace(config_of("finetune")))
    before, after = curves(record)
    assert before["barrier"] > 0.3
    assert after["loss"] == pytest.approx(flat["loss"], abs=2e-3 if evidence == "weights" else 0.1)
    assert record["alignment"]["logits_moved"] < 1e-3


@pytest.mark.slow
def test_permute_moves_fts_own_weights_and_alignment_brings_them_back(config_of):
    record = experiment.trace(config_of(permute=True, align=True))
    plain, _ = curves(experiment.trace(config_of()))
    before, after = curves(record)
    assert record["permuted"]["share_moved"]["mlp"] > 0.9
    assert before["barrier"] > 0.3
    assert before["end_loss_ft_own"] == pytest.approx(plain["end_loss_ft_own"], abs=1e-4)
    assert after["loss"] == pytest.approx(plain["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_disguise_changes_fts_own_weights_and_not_its_function(config_of):
    record = experiment.trace(config_of(disguise="rotate,units,values", permute=True))
    plain, _ = curves(experiment.trace(config_of()))
    before, _ = curves(record)
    assert record["disguised"]["rewrites"] == ["rotate", "units", "values"]
    assert record["disguised"]["logits_moved"] < 1e-4
    assert before["barrier"] > 0.3
    assert before["end_loss_ft_own"] == pytest.approx(plain["end_loss_ft_own"], abs=1e-4)


@pytest.mark.slow
def test_a_disguise_that_cannot_be_is_refused_before_weights_are_read(config_of):
    for disguise, reason in (
        ("spin", "disguise=spin: spin is none of rename"),
        ("rename,rotate", "tracing-jax disguise MODEL --disguise=rename,rotate"),
    ):
        with pytest.raises(ConfigError, match=reason):
            experiment.trace(config_of(disguise=disguise))


@pytest.mark.slow
@pytest.mark.parametrize("stat", ["cos", "emb"])
def test_a_statistic_of_weights_alone_reads_no_text(config_of, stat):
    config = config_of(stat=stat, dataset="/no/such/text.txt", align=True)
    record = experiment.trace(config)
    assert record["tokens"] is None
    assert Path(config.save).with_suffix(".html").exists()
    assert pickle.loads(Path(config.save).read_bytes())["aligned test stat"] > 0.8


@pytest.mark.slow
def test_weights_alone_are_aligned_without_tokenizers(config_of, spoilt, family):
    folders = [Path(spoilt(name=name)) for name in ("one", "other")]
    for folder in folders:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    config = config_of(base_model_id=str(folders[0]), ft_model_id=str(folders[1]), stat="cos", permute=True, align=True)
    record = experiment.trace(config)
    assert record["statistics"]["cos"]["aligned"]["headline"] > 0.999
    assert any("id by id" in note for note in record["notes"])


@pytest.mark.slow
def test_a_run_without_alignment_leaves_none_of_an_earlier_one(config_of):
    folder = Path(config_of().save).with_suffix(".run")
    for align in (True, False):
        experiment.trace(config_of(align=align))
        assert (folder / "alignment.npz").exists() is align


@pytest.mark.slow
def test_every_statistic_in_one_run_with_all_its_files_and_the_same_numbers_on_any_mesh(config_of, drawn):
    every = tuple(name for name in STATISTICS if name != "match_distilled")

    def config(stat=every, **fields):
        return config_of("disguised", **{"stat": stat, "align": True, "permute": True, **fields})

    whole = config(eval=True)
    record = experiment.trace(whole)
    _check_files(record, whole, every)
    other_mesh = experiment.trace(config(mesh={"data": 4, "model": 2}, save=None))
    for found in (record, other_mesh):
        jsonschema.validate(found, SCHEMA)
        assert outcomes(found)["record"] == "holds"
    drawing = ("csh", "match", "l2", "csu_all")
    again = experiment.trace(config(drawing, align=False))["statistics"]
    once = record["statistics"]
    assert {name: again[name]["non_aligned"] for name in drawing} == {n: once[n]["non_aligned"] for n in drawing}
    for name in once:
        for side in ("non_aligned", "aligned"):
            found = other_mesh["statistics"][name][side]["headline"]
            assert found == pytest.approx(once[name][side]["headline"], abs=1e-4)


def _check_files(record, config, every):
    """Checks what a run with all statistics and perplexities has written."""
    save = Path(config.save)
    assert sorted(file.name for file in save.parent.iterdir()) == [
        f"results.{end}" for end in ("html", "json", "p", "png", "run")
    ]
    assert json.loads(save.with_suffix(".json").read_text()) == record
    saved = pickle.loads(save.read_bytes())
    assert list(saved) == [
        "args",
        "commit",
        "non-aligned test stat",
        "aligned test stat",
        "base loss",
        "ft loss",
        "time",
    ]
    assert set(saved["non-aligned test stat"]) == set(every) >= set(statistic_names(RunOptions(stat=("all",))))
    assert saved["base loss"] == record["perplexity"]["base"]["perplexity"]
    assert saved["base loss"] == pytest.approx(np.exp(curves(record)[0]["loss"][0]), rel=1e-4)
    assert saved["ft loss"] == pytest.approx(np.exp(curves(record)[0]["end_loss_ft_own"]), rel=1e-4)
    assert record["statistics"]["cos"]["aligned"]["headline"] > 0.8
    assert record["tokens"]["num_tokens"] == 1024
    assert len(record["models"]["ft"]["files"]["model.safetensors"]) == 64


@pytest.mark.slow
def test_a_cached_model_is_restored(config_of, tmp_path):
    config = config_of(cache_dir=str(tmp_path / "cache"))
    first = experiment.trace(config)["statistics"]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert experiment.trace(config)["statistics"] == first


@pytest.mark.slow
def test_several_models_against_one_base(config_of):
    config = config_of()
    config.ft_model_id = ""
    config.ft_model_ids = (config.base_model_id, config.base_model_id.replace("base", "finetune"))
    records = experiment.run(config)
    save = Path(config.save)
    assert [record["args"]["ft_model_id"] for record in records] == list(config.ft_model_ids)
    assert save.with_suffix(".png").exists()
    assert len(json.loads(save.with_suffix(".json").read_text())["records"]) == 2
    assert (save.with_suffix(".run") / "finetune.p").exists()
    page = save.with_suffix(".html").read_text()
    for name in ("base", "finetune"):
        link = f"{save.stem}.run/{name}.html"
        assert f'href="{link}"' in page
        assert (save.parent / link).exists()
    assert list(pickle.loads(save.read_bytes())) == ["base", "finetune"]


@pytest.mark.slow
def test_models_of_one_name_do_not_overwrite_one_another_and_all_are_opened_first(config_of, family, tmp_path):
    config = config_of()
    config.ft_model_id = ""
    twin = shutil.copytree(family.member("finetune"), tmp_path / "elsewhere" / "finetune")
    config.ft_model_ids = (str(family.member("finetune")), str(twin), "/no/such/folder")
    folder = Path(config.save).with_suffix(".run")
    with pytest.raises(CheckpointError, match="/no/such/folder"):
        experiment.run(config)
    assert not folder.exists()
    config.ft_model_ids = config.ft_model_ids[:2]
    records = experiment.run(config)
    assert all("over_pairs_log10_p" in record["verdict"] for record in records)
    assert {file.name for file in folder.glob("*.p")} == {"finetune.p", "finetune-2.p"}


@pytest.fixture
def spoilt(family, tmp_path):
    """Returns a function that copies a member, changes its config and tensors, and returns the copy's path."""

    def make(config=None, tensors=None, name="spoilt"):
        folder = shutil.copytree(family.member("finetune"), tmp_path / name)
        if config:
            facts = json.loads((folder / "config.json").read_text())
            config(facts)
            (folder / "config.json").write_text(json.dumps(facts))
        if tensors:
            weights = load_file(folder / "model.safetensors")
            tensors(weights)
            save_file(weights, folder / "model.safetensors")
        return str(folder)

    return make


@pytest.fixture
def pair_of(family, tmp_path):
    """Returns a function that writes a tiny model of random weights and its disguised copy, with the demo tokenizer."""

    def make(config):
        companions = shutil.copytree(family.member("base"), tmp_path / "companions")
        config.save_pretrained(companions)
        arch = read_arch(companions)
        base, table = tiny.model(arch), axis_table(arch)
        disguise = random_permutations(jax.random.key(1), table, PERMUTABLE)
        ft = permute(tiny.noisy(base.params, 0.05), disguise, table)
        for name, params in (("base", base.params), ("ft", ft)):
            save_checkpoint(tmp_path / name, InMemory(arch, params), companions)
        return {"base_model_id": str(tmp_path / "base"), "ft_model_id": str(tmp_path / "ft")}

    return make


@pytest.mark.slow
def test_a_gpt2_is_traced_and_has_no_gates_to_compare(config_of, pair_of):
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 20, "n_positions": 64}
    config = GPT2Config(vocab_size=400, bos_token_id=None, eos_token_id=None, **sizes)
    record = experiment.trace(config_of(**pair_of(config), stat="mode,cos", align=True))
    assert "no gate" in record["statistics"]["cos"]["non_aligned"]["not_applicable"]
    before, after = (np.ptp(curve["loss"]) for curve in curves(record))
    assert before > 2 * after
    assert record["models"]["base"]["shape"]["num_experts"] is None
    with pytest.raises(ConfigError, match=r"block_size=128: .*base: blocks of 128 tokens.*\n.*block_size=128: .*ft"):
        experiment.trace(config_of(**record["args"] | {"block_size": 128}))


@pytest.mark.slow
def test_control_models_set_the_allowance_and_stand_in_the_record(config_of, family):
    controls = (str(family.member("independent")),)
    config = config_of("disguised", stat="match,match_all", control_model_ids=controls)
    record = experiment.trace(config)
    assert record["verdict"]["verdict"] == "related"
    for name in ("match", "match_all"):
        null = record["statistics"][name]["non_aligned"]["null"]
        for form in ("forward", "weights"):
            assert null[form]["u from"].startswith("control models (1), each against base and ft")
            assert all(DEFAULT_ALLOWANCE <= u < 0.5 for u in null[form]["u"])  # of few controls and few units
    assert len(record["models"]["control 0"]["files"]["model.safetensors"]) == 64
    assert "source of u" in Path(config.save).with_suffix(".html").read_text()


def test_a_control_model_that_cannot_take_bases_place_is_refused(config_of, spoilt):
    shallow = spoilt(lambda facts: facts.update(num_hidden_layers=1), drop_layer, "shallow")
    foreign = Path(spoilt(name="foreign"))
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = config_of(stat="match", control_model_ids=(shallow, str(foreign)))
    with pytest.raises(ConfigError, match=r"(?s)shallow: num_layers 1, expected base's 2.*foreign: another tokenizer"):
        experiment.trace(config)


def drop_layer(weights):
    for name in [name for name in weights if ".layers.1." in name]:
        del weights[name]


@pytest.mark.slow
def test_statistics_that_do_not_apply_are_recorded_and_the_rest_runs(config_of, spoilt):
    shallow = spoilt(lambda facts: facts.update(num_hidden_layers=1), drop_layer)
    record = experiment.trace(config_of(ft_model_id=shallow, stat="all", align=True))
    assert "different depth" in record["statistics"]["mode"]["non_aligned"]["not_applicable"]
    assert record["statistics"]["emb"]["aligned"] is record["alignment"] is None
    assert any("not aligned: depth: 2 layers in base, 1 in ft" in note for note in record["notes"])
    assert record["statistics"]["emb"]["non_aligned"]["headline"] > 0.8


def truncate(folder):
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


@pytest.mark.parametrize(("change", "message"), [
    (lambda spoilt: {"ft_model_id": "/no/such/folder"}, "/no/such/folder"),
    (lambda spoilt: {"ft_model_id": ""}, "ft_model_id is not set"),
    (lambda spoilt: {"ft_model_id": "demo:cousin"}, "the demo has base, finetune"),
    (lambda spoilt: {"ft_model_id": truncate(spoilt())}, "truncated or corrupt"),
    (lambda spoilt: {"ft_model_id": spoilt(None, drop_layer)}, "missing tensor model.layers.1"),
    (lambda spoilt: {"ft_model_id": spoilt(None, lambda w: w.update({"model.norm.weight": np.ones(7, np.float32)}))},
     "wrong shape of model.norm.weight"),
    (lambda spoilt: {"ft_model_id": spoilt(None, lambda w: w["model.norm.weight"].fill(np.nan))}, "NaN or infinite"),
    (lambda spoilt: {"ft_model_id": spoilt(lambda facts: facts.pop("rope_parameters"))}, "no rope in this config"),
    (lambda spoilt: {"stat": "csx"}, "stat=csx: csx is none of mode, cos, emb.*did you mean cs"),
    (lambda spoilt: {"stat": ""}, "no statistic"),
    (lambda spoilt: {"align_axes": "embed,qk_dim"}, "align_axes=embed,qk_dim: qk_dim is none of embed, mlp"),
    (lambda spoilt: {"mode": {"alphas": (0.0, 1.5)}}, "mode.alphas=0.0,1.5: at least 0 and at most 1"),
    (lambda spoilt: {"dataset": "/no/such/text.txt"}, "/no/such/text.txt"),
    (lambda spoilt: {"block_size": 10**6, "num_tokens": 10**7}, "a block of 1000000 needs"),
    (lambda spoilt: {"num_tokens": 63}, "num_tokens=63: at least 64"),
    (lambda spoilt: {"emb": {"max_rows": 0}}, "emb.max_rows=0: at least 1"),
    (lambda spoilt: {"seed": -1}, "seed=-1: at least 0"),
    (lambda spoilt: {"permute": True, "permute_axes": ""}, "permute_axes is empty"),
    (lambda spoilt: {"permute": True, "permute_axes": "expert"}, "permute_axes=expert: .*no axis of kind expert"),
    (lambda spoilt: {"mesh": {"data": 9, "model": 1}}, "8 are there"),
    (lambda spoilt: {"dtype": "float8", "batch_size": 0}, "batch_size=0: at least 1"),
])  # fmt: skip
def test_bad_input_is_refused_and_nothing_is_written(config_of, spoilt, change, message):
    config = config_of(**change(spoilt))
    with pytest.raises((ConfigError, CheckpointError, UnsupportedModelError, ValueError, OSError), match=message):
        experiment.trace(config)
    out = Path(config.save).parent
    assert not out.exists() or not list(out.iterdir())


def test_hashing_ends_with_a_run_that_fails(config_of, monkeypatch):
    hashed = []

    def hash_until_stopped(files, stop):
        hashed.append(stop.wait(60))
        raise HashingStoppedError

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metadata, "file_hashes", hash_until_stopped)
    monkeypatch.setattr(steps, "_compute", fail)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        experiment.trace(config_of())
    assert time.monotonic() - start < 50
    assert hashed == [True]  # the files of the second model are not begun


def test_a_data_set_without_a_text_column_is_refused(config_of, tmp_path):
    file = tmp_path / "numbers.jsonl"
    file.write_text('{"a": 1, "b": 2}\n')
    with pytest.raises(ValueError, match=r"column.*a.*b"):
        experiment.trace(config_of(dataset=str(file)))


def test_an_unwritable_save_path_is_refused_first(config_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, expected a folder"):
        experiment.trace(config_of(save=str(tmp_path / "file" / "results.p"), ft_model_id="/no/such/folder"))


def test_models_with_other_tokenizers_are_compared_per_byte(config_of, spoilt, family):
    """A tokenizer without merges: another count of tokens for the same text, which both models read."""
    other = Path(spoilt(name="bytes"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused = experiment.trace(config_of(ft_model_id=str(other)))["statistics"]["mode"]["non_aligned"]
    assert "different tokenizers" in refused["not_applicable"]
    record = experiment.trace(config_of(ft_model_id=str(other), mode={"emb": False}, eval=True))
    base, ft = record["perplexity"]["base"], record["perplexity"]["ft"]
    assert ft["tokens"] > 1.5 * base["tokens"]
    assert ft["bytes"] == pytest.approx(base["bytes"], rel=0.1)
    assert ft["nats_per_byte"] > base["nats_per_byte"]
    assert curves(record)[0]["end_loss_ft_own"] is None
    assert any("per byte" in note for note in record["notes"])


@pytest.mark.slow
def test_random_tokens_are_those_of_both_vocabularies(family, tmp_path):
    config = to_config(RunOptions(stat=("mode",)))
    config.base_model_id, config.ft_model_id = (str(family.member(name)) for name in ("base", "finetune"))
    config.dataset, config.num_tokens, config.block_size, config.save = "random", 256, 32, str(tmp_path / "r.p")
    first, again = (open_inputs(RunOptions.from_config(config)) for _ in range(2))
    assert first.text.base.tokens.shape == (8, 32)
    assert first.text.base.sha256 == again.text.base.sha256
    assert set(first.text.base.tokens.ravel()) <= set(first.vocabularies.ids_base)
    config.seed = 1
    assert open_inputs(RunOptions.from_config(config)).text.base.sha256 != first.text.base.sha256
    losses = experiment.trace(config)["statistics"]["mode"]["non_aligned"]["curve"]["loss"]
    assert min(losses) > np.log(len(first.vocabularies.ids_base))  # no model predicts them


def test_auto_is_fixed_by_the_options_and_the_shapes():
    """A text adds tests of activations, experts the one that assigns MLPs; width bounds costs and leaves tests out."""
    without, with_text = (RunOptions(stat=("auto",), dataset=text) for text in (None, "demo"))
    assert set(statistic_names(with_text)) - set(statistic_names(without)) == {"csh"}
    arch = tiny.qwen3_gqa()
    deep, wide = dataclasses.replace(arch, num_layers=3), dataclasses.replace(arch, embed_dim=2048)
    every = make_statistics(without)
    assert set(every) - set(fitted_to_shapes(without, every, arch, arch)) == {"match_mlps"}
    assert fitted_to_shapes(without, every, tiny.mixtral(), deep) == every
    assert not too_costly(without, every, arch, arch)
    costly = {"csu_procrustes", "features_in_place", "match_crossfit", "unseen_tokens"}
    assert set(too_costly(without, every, wide, arch)) == costly
    assert (every["csu"].units, fitted_to_shapes(without, every, wide, wide)["csu"].units) == (0, 1024)
    moments = fitted_to_shapes(without, every, wide, wide)["match_moments"]
    assert (moments.forms, moments.layers, moments.units) == (("layer",), 1, 1024)
    asked = dataclasses.replace(without, stat=("auto", "match_all", "csu"), csu=options.Csu(units=7))
    assert "match_all" in fitted_to_shapes(asked, every, arch, arch)
    assert fitted_to_shapes(asked, make_statistics(asked), wide, wide)["csu"].units == 7
    chosen = dataclasses.replace(without, match=options.Match(units=7))
    assert fitted_to_shapes(chosen, make_statistics(chosen), wide, wide)["match"].units == 7


@pytest.mark.slow
def test_the_first_layers_alone_clear_nobody(config_of, family, tmp_path):
    """All layers but the first are base's: a comparison of the first says that it is one of the first."""
    base, other = (tj.load(str(family.member(name))) for name in ("base", "independent"))
    mixed = InMemory(other.arch, other.params | {"layers": base.params["layers"] | {"0": other.params["layers"]["0"]}})
    tj.save(tmp_path / "mixed", mixed, companions=family.member("independent"))
    config = config_of(stat="csu,match_io", dataset=None, max_layers=1)
    config.ft_model_id = str(tmp_path / "mixed")
    found = experiment.trace(config)["verdict"]
    assert found["verdict"] == "undecided"
    assert found["blind_to"]["match_io"] == ["what is in layers after the first"]
    config.max_layers = 0
    assert experiment.trace(config)["verdict"]["verdict"] == "related"


@pytest.mark.slow
def test_layers_are_assigned_where_one_of_equally_many_does_nothing(config_of, family, tmp_path):
    """A layer that does nothing in front and the last one dropped: all others have moved, and units are permuted."""
    finetune = tj.load(str(family.member("finetune")))
    layers, count = finetune.params["layers"], finetune.arch.num_layers
    idle = map_named(lambda name, leaf: 0 * leaf if "down_proj" in name or "o_proj" in name else leaf, layers["0"])
    moved = {"0": idle} | {str(i): layers[str(i - 1)] for i in range(1, count)}
    moved = InMemory(finetune.arch, finetune.params | {"layers": moved})
    tj.save(tmp_path / "moved", moved, companions=family.member("finetune"))
    config = config_of(stat="auto", disguise="permute", dataset=None)
    config.ft_model_id = str(tmp_path / "moved")
    verdict = experiment.trace(config)["verdict"]
    assert (verdict["verdict"], verdict["statistic"]) == ("related", "match_all")
    assert "layers that were moved" in verdict["blind_to"]["match"]
    config.ft_model_id, config.disguise = str(family.member("finetune")), ""
    record = experiment.trace(config)
    assert "match_all" not in record["verdict"]["family"]
    assert not [note for note in record["notes"] if "match_all" in note]


def test_a_pair_to_which_nothing_applies_is_an_answer(config_of):
    record = experiment.trace(config_of("finetune", stat="match_all", match_all={"max_gib": 1e-6}))
    assert record["verdict"]["verdict"] == "not_testable"
    assert "raise it" in record["verdict"]["meaning"]
    deeper = experiment.trace(config_of("finetune", stat="match", disguise="all"))  # seen as the model that it becomes
    assert "different depth (2 and 3 layers)" in deeper["verdict"]["meaning"]


def test_identical_models_are_said_to_be_before_anything_else(config_of, family):
    same = experiment.trace(config_of("base", stat="csu"))
    assert (same["verdict"]["verdict"], same["identical"]["equal"]) == ("identical", same["identical"]["total"])
    assert same["statistics"]["csu"]["non_aligned"]["log10_p"] is not None  # it was asked for by name
    auto = experiment.trace(config_of("base", stat="auto"))
    assert auto["verdict"]["verdict"] == "identical"
    assert not auto["verdict"]["family"]
    assert "the tensors themselves" in summary([auto])
    assert {sides["non_aligned"]["not_applicable"] for sides in auto["statistics"].values()} == {IDENTICAL}
    other = experiment.trace(config_of("independent", stat="csu"))
    assert 0 <= other["identical"]["equal"] < other["identical"]["total"]
    permuted = experiment.trace(config_of("base", stat="csu", permute=True))
    assert permuted["identical"] is None


def test_only_block_sizes_that_nobody_chose_are_fitted():
    short, long = (tiny.gpt2(num_positions=positions) for positions in (24, 4096))
    default = RunOptions(stat=("csh",))
    fitted, notes = with_fitting_blocks(default, short, long)
    assert (fitted.block_size, fitted.csh.block_size, len(notes)) == (24, 24, 2)
    assert with_fitting_blocks(default, long, tiny.llama_mha()) == (default, [])
    chosen = dataclasses.replace(default, block_size=100, csh=dataclasses.replace(default.csh, block_size=100))
    assert with_fitting_blocks(chosen, short, long) == (chosen, [])


def _without_tokenizer(folder):
    for file in Path(folder).glob("tokenizer*"):
        file.unlink()
    return folder


@pytest.mark.slow
def test_models_without_tokenizers_are_compared_by_token_id(config_of, spoilt):
    ft = _without_tokenizer(spoilt())
    (Path(ft) / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization.Own", null]}}')
    (Path(ft) / "tokenizer.model").write_bytes(b"not read")
    record = experiment.trace(config_of(stat="match_io", dataset="", ft_model_id=ft))
    assert record["statistics"]["match_io"]["non_aligned"]["headline"] > 0.9
    notes = "\n".join(record["notes"])
    assert "ft has no tokenizer that can be read" in notes
    assert "both have 400 tokens, which are taken to be the same, id by id" in notes


@pytest.mark.slow
def test_tokenizer_of_another_folder_is_read_in_place_of_a_missing_one(config_of, spoilt, family):
    config = config_of(stat="jsd", ft_model_id=_without_tokenizer(spoilt()))
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        experiment.trace(config)
    config.tokenizer_id = str(family.member("base"))
    record = experiment.trace(config)
    assert record["statistics"]["jsd"]["non_aligned"]["headline"] >= 0
    assert any("ft: the tokenizer is that of" in note for note in record["notes"])


@pytest.mark.slow
def test_default_blocks_are_fitted_to_learned_positions(config_of, pair_of):
    sizes = {"vocab_size": 400, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}
    pair = pair_of(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    config = config_of(stat="csh,jsd", block_size=512, num_tokens=512, csh={"blocks": 2}, **pair)
    record = experiment.trace(config)
    notes = "\n".join(record["notes"])
    assert "block_size: 32, which is as many positions as the models have, not 512" in notes
    assert "csh.block_size: 32" in notes
    with pytest.raises(ConfigError, match=r"csh\.block_size=33: .*32 positions"):
        experiment.trace(config_of(stat="csh", csh={"block_size": 33}, **pair))


def test_tokens_of_the_text_of_the_package_are_known_of_both_vocabularies(family):
    base, ft = (str(family.member(name)) for name in ("base", "finetune"))
    found = open_inputs(RunOptions(base_model_id=base, ft_model_id=ft, stat=("csu",))).vocabularies
    expected = set(load_tokenizer(base)(sample_documents().text, add_special_tokens=False)["input_ids"])
    assert set(found.ids_base[found.in_text].tolist()) == set(found.ids_ft[found.in_text].tolist()) == expected


def test_what_is_left_of_a_run_is_that_of_the_same_commits(family, tmp_path, monkeypatch):
    """Weights that are read from the Hub in ranges have no files whose times of change could tell them apart."""
    monkeypatch.setattr("tracing_jax.run_cache.HELD_SECONDS", 0.0)
    base, ft = (str(family.member(name)) for name in ("base", "finetune"))
    options = RunOptions(base_model_id=base, ft_model_id=ft, stat=("csu",), save=str(tmp_path / "run.p"))
    inputs = open_inputs(options)
    placement = choose_placement(options, inputs)

    def kept_of(revision, **changes):
        at = dataclasses.replace(inputs, ft=dataclasses.replace(inputs.ft, revision=revision, **changes))
        return experiment._run_cache(options, at, placement)[0]

    kept_of("one").save_arrays(lambda: {"found": np.zeros(1)}, "found")
    assert kept_of("one").load_arrays("found") is not None
    assert kept_of("other").load_arrays("found") is None
    kept_of("one").save_arrays(lambda: {"found": np.zeros(1)}, "found")
    edited = dataclasses.replace(inputs.ft.arch, norm_eps=0.5)  # the config was edited, or a layout: no weight changed
    assert kept_of("one", arch=edited).load_arrays("found") is None
