"""Options: one declaration each, typed from parsing on, and a mistake answered with the name that is meant."""

import importlib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from tracing_jax import options
from tracing_jax.alignment import KINDS, WHOLE
from tracing_jax.axes import PERMUTABLE
from tracing_jax.cli.config_files import to_config
from tracing_jax.dataclass_options import ConfigError, comma_list, options_of, problems, replaced, sections_of
from tracing_jax.experiment.validation import DTYPES, make_statistics
from tracing_jax.options import COMPARE, MOVED, STATISTICS, RunOptions, unknown_option
from tracing_jax.rewrites import DISGUISES
from tracing_jax.statistics import COSTLY, LIGHT, REGISTRY, make_statistic
from tracing_jax.statistics.verdict import UNDECIDED_BELOW

CONFIGS = sorted(file.stem for file in Path(__file__).parents[1].glob("configs/*.py") if file.stem != "__init__")
BY_NAME = {found.name: found for found in options_of(RunOptions)}


def test_each_statistic_is_its_section():
    assert list(STATISTICS) == list(REGISTRY)
    for name, kind in REGISTRY.items():
        assert issubclass(kind, STATISTICS[name])
        assert sections_of(RunOptions)[name] is STATISTICS[name]
        assert {field.name for field in fields(kind)} - {"level"} == {field.name for field in fields(STATISTICS[name])}


def test_a_statistic_is_made_from_its_section_and_takes_the_level_of_the_run():
    made = make_statistic("match_all", RunOptions(level=0.01, match_all=options.MatchAll(units=7)))
    assert (made.units, made.level, made.forms) == (7, 0.01, ("forward", "weights"))
    assert make_statistic("csh", RunOptions(csh=options.Csh(activation="up"))).activation == "up"


def test_choices_are_what_the_package_has():
    assert options.PERMUTABLE == PERMUTABLE
    assert (*KINDS, *WHOLE) == options.ALIGNABLE
    assert (*DISGUISES, "all") == options.REWRITES
    assert BY_NAME["dtype"].choices == tuple(DTYPES)
    assert problems(RunOptions(level=UNDECIDED_BELOW)) == []
    assert problems(RunOptions(level=1.01 * UNDECIDED_BELOW))
    for name in COSTLY | LIGHT:
        assert name in BY_NAME["stat"].meaning


def test_every_option_has_a_meaning_in_one_line_and_defaults_that_are_valid():
    for found in options_of(RunOptions):
        assert found.meaning.endswith("."), found.name
        assert "\n" not in found.meaning
    assert problems(RunOptions()) == problems(COMPARE) == problems(options.ZOO) == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", [RunOptions(), COMPARE, options.ZOO, RunOptions(stat=("csh",)).on_demo()])
def test_a_config_comes_back_as_the_options_it_was_made_from(preset):
    assert RunOptions.from_config(to_config(preset)) == preset
    assert RunOptions.from_config(preset.as_dict()) == preset
    assert RunOptions.from_config(preset) is preset


def test_a_space_after_a_comma_changes_nothing():
    assert comma_list(" weights, forward ,") == ("weights", "forward")
    config = to_config(COMPARE)
    config.dataset, config.stat, config.match.forms = "wikitext", "csu, match", "weights, forward"
    read = RunOptions.from_config(config)
    assert read.stat == ("csu", "match")
    assert problems(read) == []
    assert make_statistics(read)["match"].needs_tokens


def test_without_a_text_match_compares_by_weights_alone():
    assert make_statistics(COMPARE)["match"].forms == ("weights",)
    assert make_statistics(replace(COMPARE, dataset="wikitext"))["match"].forms == ("forward", "weights")
    forward = replaced(COMPARE, {"match.forms": ("forward",)})
    assert make_statistics(forward)["match"].forms == ("forward",)  # asked for: refused elsewhere, and not changed


@pytest.mark.parametrize(("config", "lines"), [
    ({"batch_size": "many"}, ["batch_size='many': expected a whole number"]),
    ({"batch_size": True, "eval": 1, "level": "low"}, ["batch_size=True", "eval=1: expected true or false", "level="]),
    ({"dtype": None}, ["dtype=None: expected text"]),
    ({"mode": {"alphas": "0,half"}}, ["mode.alphas='0,half': expected numbers with commas between"]),
    ({"match": {"max_token": 3}}, ["match.max_token: there is no such option; did you mean match.max_tokens?"]),
    ({"matsch": {"max_tokens": 3}}, ["matsch: there is no such option; did you mean match"]),
    ({"emb": True}, ["emb: that option is mode.emb or perm_mode_l2.emb now"]),
    ({"csh": 4}, ["csh: it is a section, with options of its own"]),
])  # fmt: skip
def test_unknown_options_and_values_of_the_wrong_type_are_reported_at_once(config, lines):
    for given in (config, ConfigDict(config)):
        with pytest.raises(ConfigError) as error:
            RunOptions.from_config(given)
        for line in lines:
            assert line in str(error.value)


def test_an_option_of_the_last_release_is_answered_with_its_new_name():
    for name, now in MOVED.items():
        assert f"{name}: that option is {now} now" in unknown_option(f"{name}=")
        for dotted in now.split(" or "):
            assert unknown_option(f"{dotted}=") is None


@pytest.mark.parametrize(("values", "line"), [
    ({"batch_size": 0}, "batch_size=0: at least 1"),
    ({"level": 0.5}, "level=0.5: above 0 and at most 0.05"),
    ({"mode.alphas": (0.0, 1.5)}, "mode.alphas=0.0,1.5: at least 0 and at most 1"),
    ({"csh.activation": "upp"}, "csh.activation=upp: upp is none of hidden, up; did you mean up?"),
    ({"stat": ("csu", "mtch")}, "did you mean match?"),
    ({"perm_mode_l2.num_perm": 0}, "perm_mode_l2.num_perm=0: at least 1"),
])  # fmt: skip
def test_a_value_out_of_range_is_found(values, line):
    found = problems(replaced(RunOptions(), values))
    assert len(found) == 1
    assert line in found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_an_experiment_on_given_models_and_on_the_demo(name):
    module = importlib.import_module(f"configs.{name}")
    assert f"configs/{name}.py" in module.__doc__
    for arg in ("", "demo"):
        assert problems(RunOptions.from_config(module.get_config(arg))) == []
    with pytest.raises(ValueError, match="demoo"):
        module.get_config("demoo")


def test_the_compare_config_is_what_the_command_runs():
    assert RunOptions.from_config(importlib.import_module("configs.compare").get_config()) == COMPARE
