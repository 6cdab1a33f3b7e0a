"""Each kind of damage ends in a right answer or one clear error; `benchmarks.fuzz` makes thousands, with limits."""

import shutil

import numpy as np
import pytest

from benchmarks.fuzz import outcome_of
from benchmarks.mutations import LAYOUTS, MUTATIONS, write_checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("fuzz") / "whole")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_undamaged_checkpoints_are_read(checkpoints, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert outcome_of(checkpoints[layout]) == ("read", "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_damaged_checkpoints_end_in_one_clear_error(checkpoints, name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layout, mutate, _ = MUTATIONS[name]
    for seed in range(1 if "million" in name or "bomb" in name else 5):
        copy = shutil.copytree(checkpoints[layout], tmp_path / str(seed) / layout)
        mutate(np.random.default_rng(seed), copy)
        outcome, message = outcome_of(copy)
        assert outcome in ("read", "unchecked", "refused"), message
