"""What the benchmark measures with is right: memory, compilations, operations, and the page that holds its tables."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.optimize import linear_sum_assignment

from benchmarks import estimates, results
from benchmarks.assignment import INPUTS
from benchmarks.memory_limits import GIB, LIMITS, Limit, Outcome
from benchmarks.plan import Rates, Step, plan
from benchmarks.results import Row, table
from benchmarks.run_cost import compilations, peak_anonymous_bytes
from benchmarks.speed.reading import plain_reading
from benchmarks.speed.scaling import Line
from benchmarks.speed.sizes import SIZES, random_pair
from benchmarks.speed.timing import block_flops_per_token, gram_flops_per_token, head_flops_per_token
from tracing_jax.models import apply_block, apply_head, layer_inputs
from tracing_jax.tree import flatten

MIB = 2**20


def test_peak_holds_what_lived_shortly_and_no_pages_of_files(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(60 * MIB))
    with peak_anonymous_bytes() as read:
        mapped = np.memmap(file, np.uint8, "r")
        assert mapped.sum() == 0
        assert plain_reading((file,)) == 60 * MIB
    with peak_anonymous_bytes() as held:
        array = np.ones(160 * MIB, np.uint8)
        assert array.sum() == 160 * MIB
        del array
    assert read.peak_bytes - read.start_bytes < 40 * MIB
    assert 150 * MIB < held.peak_bytes - held.start_bytes < 250 * MIB


def test_compilations_are_without_repeats_for_each_shape_and_only_inside():
    @jax.jit
    def squared(x):
        return x * x

    with compilations() as found:
        for shape in ((3,), (3,), (4,)):
            squared(np.ones(shape, np.float32))
    squared(np.ones(5, np.float32))
    assert found.count["squared"] == 2
    assert found.seconds > 0


def _operations(function, *arguments):
    """Returns what XLA counts for a compiled function."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("make", [tiny.llama_mha, tiny.qwen3_gqa, tiny.gpt2])
def test_operations_of_a_block_are_about_those_that_xla_counts(make):
    arch = make(mlp_dim=512, embed_dim=256)
    params, x = tiny.params_of(arch), jnp.ones((2, 16, 256))
    inputs = layer_inputs(arch, 0)
    counted = _operations(lambda layer, x: apply_block(arch, layer, x, inputs).hidden, params["layers"]["0"], x)
    assert block_flops_per_token(arch, 16) * 32 == pytest.approx(counted, rel=0.05)
    embedding = params["embed"]["embedding"] if arch.tied else None
    counted = _operations(lambda head, x: apply_head(arch, head, x, embedding), params["head"], x)
    assert head_flops_per_token(arch) * 32 == pytest.approx(counted, rel=0.15)


def test_operations_of_a_gram_are_those_that_xla_counts():
    arch = tiny.llama_mha()
    units = jnp.ones((50, arch.mlp_dim))
    counted = _operations(lambda a, b: jnp.einsum("tu,tv->uv", a, b), units, units)
    assert gram_flops_per_token(arch, 1) * 50 == pytest.approx(counted)


def test_random_models_of_any_depth_share_their_layers():
    base, ft = random_pair(tiny.llama_mha(), 7)
    assert base.arch.num_layers == len(base.params["layers"]) == 7
    assert base.layer(6) is base.layer(0)
    for name, leaf in flatten(base.layer(0)).items():
        assert not np.array_equal(leaf, flatten(ft.layer(0))[name]), name


def test_kinds_of_assignment_are_as_hard_as_their_names_say():
    """Of related rows nearly every one has its maximum; of independent ones few do, of those like activations fewer."""
    shares = {}
    for name, make in INPUTS.items():
        similarity = make(200, np.random.default_rng(0))
        _, columns = linear_sum_assignment(similarity, maximize=True)
        shares[name] = float((similarity.argmax(axis=1) == columns).mean())
    assert shares["related"] > 0.99
    assert shares["activation-like"] < shares["independent"] < 0.7


def test_whether_a_line_is_straight_is_measured():
    straight = Line("depth", "layers", "step", (1, 2, 4), (3.0, 5.0, 9.0))
    assert straight.fit == pytest.approx((2, 1))
    assert straight.bend == pytest.approx(0, abs=1e-12)
    assert straight.row.ratio == pytest.approx(1)
    bent = Line("depth", "layers", "step", (1, 2, 4), (1.0, 4.0, 16.0))
    assert bent.bend > 0.2
    assert bent.row.ratio == pytest.approx(2)


def test_rows_are_ratios_with_both_figures_beside():
    row = Row("reading", "warm", 1.5, 3.0, "GB/s", "a plain read", "a note")
    assert row.ratio == 0.5
    assert row.as_dict()["ratio"] == 0.5
    line = table([row]).splitlines()[-1].split("  ")
    assert [cell.strip() for cell in line if cell.strip()][2:6] == ["0.5", "a plain read", "1.5", "3"]


def test_publishing_replaces_one_table_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tiny -->\nold\n<!-- end of tiny -->\nafter\n", encoding="utf-8")
    results.replace_between("tiny", "new\n", page)
    results.replace_between("tiny", "newer\n", page)
    assert page.read_text("utf-8") == "before\n<!-- tiny -->\nnewer\n<!-- end of tiny -->\nafter\n"
    with pytest.raises(ValueError, match="no place for large"):
        results.replace_between("large", "new\n", page)


def test_every_table_has_its_place():
    text = results.PAGE.read_text("utf-8")
    for mark in (*SIZES, *(f"memory {name}" for name in LIMITS)):
        assert text.count(f"<!-- {mark} -->\n") == text.count(f"<!-- end of {mark} -->\n") == 1, mark


def test_a_limit_holds_at_its_peak_and_breaks_above_or_without_an_end(tmp_path):
    from benchmarks.run_cost import Cost

    limit = Limit("csu", "csu", 4, 3.0)
    cost = Cost(12.0, {"open": 2.0, "statistic": 8.0, "hashes": 2.0}, 3 * GIB, MIB, 1.0, {"step": 1})
    held = Outcome(limit, 4, 32, cost)
    assert held.holds
    assert held.cells[-2] == f"{(4 + 8 * 8) / 3600:.2f}"
    assert not Outcome(Limit("csu", "csu", 4, 2.9), 4, 32, cost).holds
    failed = Outcome(limit, 4, 32, None, "first\nlast")
    assert not failed.holds
    assert failed.cells[-1] == "last"


@pytest.mark.slow
def test_the_plan_reads_what_the_steps_need(tmp_path):
    from benchmarks.pairs import PairSpec, config_of, write_pair
    from tracing_jax.checkpoint import open_checkpoint

    write_pair(tmp_path / "pair", config_of("tiny"), PairSpec())
    model = open_checkpoint(str(tmp_path / "pair" / "base"))
    steps = {step.name: step for step in plan(model, 1024, 128, 3)}
    layers, rows = model.arch.num_layers, 64 * 160  # in two bytes each
    assert steps["csu"].read_bytes == 2 * layers * 2 * (4 * rows + 64)  # gate, up, down and a norm, then up again
    assert steps["mode"].read_bytes == 3 * model.num_bytes
    assert all(step.flops > 0 for step in steps.values())
    assert Rates(2.0, 4.0).seconds(Step("", 10, 12)) == 5


def test_estimated_costs_are_bounded_by_arithmetic_or_by_reading():
    arch = SIZES["tiny"].arch
    found = {step.name: (step, peak) for step, peak in estimates.steps(arch)}
    csu, peak = found["csu"]
    rows = np.ones((arch.mlp_dim, arch.embed_dim), np.float32)
    product = jax.jit(lambda a, b: a @ b.T).lower(rows, rows).cost_analysis()
    assert csu.flops == arch.num_layers * product["flops"]
    eight, sixteen = (estimates.rates(n, peak) for n in (8, 16))
    assert 2 * sixteen.seconds(csu) == pytest.approx(eight.seconds(csu))
    assert Rates(1.0, 1e30).seconds(csu) == csu.read_bytes
    assert "| llama3.1-405b | 1,623 GB | csu | 1.2e+16 |" in estimates.table()


@pytest.mark.slow
def test_a_run_of_main_says_what_it_cost(tmp_path):
    from benchmarks.pairs import PairSpec, config_of, write_pair
    from benchmarks.run_cost import FailedRunError, measured_run

    write_pair(tmp_path / "pair", config_of("tiny", 1), PairSpec())
    base, ft = tmp_path / "pair" / "base", tmp_path / "pair" / "ft"
    cost = measured_run(base, ft, "cos", {})
    assert {"open", "statistic"} <= cost.seconds_by_step.keys()
    assert 50 * MIB < cost.start_bytes < cost.peak_bytes < 4 * GIB
    assert 0 < cost.compile_seconds < cost.seconds
    assert sum(cost.compilations.values()) > 1
    json.dumps(cost.compilations)
    with pytest.raises(FailedRunError, match="nonsense is none of"):
        measured_run(base, ft, "nonsense", {})


def test_controls_of_mode_are_those_of_the_published_table():
    from benchmarks.paths import CONTROLS, CURVE_KINDS, PAGE
    from tracing_jax.statistics import mode

    rows = [line.split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    table = {row[1].strip(): row for row in rows}
    for kind, controls in mode.CONTROLS.items():
        column = table["barrier, nats per token"].index(f" {kind} ")
        assert controls.keys() == CONTROLS.keys()
        for how, titles in CONTROLS.items():
            ranges = [re.findall(r"-?[0-9.]+", table[title][column])[1:3] for title in titles]
            ranges = [found for found in ranges if found]  # a row may not be measured yet
            _, least, greatest = controls[how]
            assert least == pytest.approx(min(float(low) for low, _ in ranges), abs=0.011), (kind, how)
            assert greatest == pytest.approx(max(float(high) for _, high in ranges), abs=0.011), (kind, how)
    titles = table["barrier by curve, nats per token"]
    assert mode.FURTHER_CONTROLS.keys() == CURVE_KINDS.keys() - {"straight"}
    for kind, controls in mode.FURTHER_CONTROLS.items():
        assert controls.keys() == {"none", "permutations", "maps"}
        for how, (_, least, greatest) in controls.items():
            cells = [table[CURVE_KINDS[kind]][titles.index(f" {title} ")] for title in CONTROLS[how]]
            ranges = [re.findall(r"-?[0-9.]+", cell)[1:3] for cell in cells]
            assert least == pytest.approx(min(float(low) for low, _ in ranges), abs=0.011), (kind, how)
            assert greatest == pytest.approx(max(float(high) for _, high in ranges), abs=0.011), (kind, how)
