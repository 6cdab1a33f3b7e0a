"""Where there is no terminal, the log says how far a run is, once in a while, and a short run says nothing more."""

import re
import time

import pytest
from absl import logging

from tracing_jax.progress import reporting, tqdm, trange, working


@pytest.fixture
def lines(caplog):
    """What the log has, when asked."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    caplog.set_level("INFO")
    yield lambda: [record.getMessage() for record in caplog.records]
    logging.set_verbosity(verbosity)


def test_a_long_loop_is_reported_with_what_is_left(lines):
    with reporting(0.05), working("match_io (4 of 10)"):
        for _ in tqdm([1, 2, 3, 4], desc="layers of base", unit="layer", disable=None):
            time.sleep(0.08)
    found = lines()
    assert found
    assert all(line.startswith("match_io (4 of 10)") for line in found)
    counted = [re.search(r"layers of base: (\d) of 4 layers, \d:\d\d(, about \d:\d\d left)?$", line) for line in found]
    counts = [int(match[1]) for match in counted if match]
    assert counts == sorted(counts)
    assert any(match[2] for match in counted if match and match[1] != "0")
    assert not any(match[2] for match in counted if match and match[1] == "0")


def test_a_silent_step_is_reported_and_lines_of_others_put_it_off(lines):
    with reporting(0.2), working("open"):
        for _ in range(5):
            time.sleep(0.06)
            logging.info("another line")
        assert lines() == ["another line"] * 5
        time.sleep(0.3)
    assert lines()[5:] == ["open"]


def test_a_short_run_has_no_line_and_nothing_is_left_behind(lines):
    with reporting(), working("open"):
        for _ in trange(3, desc="layers"):
            pass
    with reporting(0.02):
        time.sleep(0.05)
    assert lines() == []


def test_loops_that_are_left_early_are_forgotten(lines):
    for _ in tqdm([1, 2], desc="left early", disable=True):
        break
    with tqdm(total=3, desc="counted", unit="pair", disable=True) as bar, reporting(0.02):
        bar.update()
        time.sleep(0.05)
    assert lines()
    assert all(re.fullmatch(r"counted: 1 of 3 pairs, 0:00, about 0:00 left", line) for line in lines())


def test_items_are_those_of_the_iterable():
    assert list(tqdm("abc", disable=True)) == list(tqdm("abc", disable=None)) == ["a", "b", "c"]
    assert list(trange(2, 5, disable=True)) == [2, 3, 4]
