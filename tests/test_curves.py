"""Curves between models: linear combinations, a trained Bezier curve, and what is refused."""

import jax
import numpy as np
import pytest
import tiny
from cases import slow
from matplotlib.figure import Figure

from tracing_jax.axes import axis_table
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment import trace
from tracing_jax.experiment.validation import check_options
from tracing_jax.forward import BezierTraining, combination_losses, path_losses, token_losses, trained_midpoint
from tracing_jax.forward.bezier import loss_on_curve
from tracing_jax.interpolation import combine, interpolate, interpolated_leaves, on_bezier, path_groups
from tracing_jax.options import RunOptions
from tracing_jax.report.panels import draw_path
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, MappedSource
from tracing_jax.statistics.mode import NO_DESCENT, further_note
from tracing_jax.tree import flatten

ARCH = tiny.llama_mha()
ALL = path_groups(attn=True, emb=True)
ALPHAS = np.array([0.0, 0.3, 0.5, 1.0])
BASE, FT = tiny.model(ARCH, 0), tiny.model(ARCH, 1)
TOKENS = np.random.default_rng(0).integers(61, size=(40, 8), dtype=np.int32)


@pytest.fixture(scope="module")
def one_device():
    return Compute(make_mesh(1, 1), batch_size=8)


def middle(groups):
    moved = interpolated_leaves(axis_table(ARCH), groups)
    return InMemory(ARCH, interpolate(BASE.params, FT.params, 0.5, moved))


@pytest.mark.parametrize("groups", [ALL, slow(path_groups(False, False))])
def test_a_bezier_curve_through_the_middle_of_the_straight_path_is_that_path(groups, one_device):
    models = [BASE, FT, middle(groups)]
    straight = path_losses(BASE, FT, TOKENS, ALPHAS, groups, one_device)
    curved = combination_losses(models, on_bezier(ALPHAS), TOKENS, groups, one_device)
    np.testing.assert_allclose(curved, straight, atol=2e-5)
    np.testing.assert_array_equal(curved[[0, -1]], straight[[0, -1]])


def test_the_ends_of_a_curve_are_exact_wherever_its_middle_point_is():
    far = jax.tree.map(lambda leaf: 1000 * leaf + 1, BASE.params)
    moved = interpolated_leaves(axis_table(ARCH), ALL)
    for t, end in ((0.0, BASE), (1.0, FT)):
        point = combine(BASE.params, [FT.params, far], on_bezier(np.array(t)), moved)
        jax.tree.map(np.testing.assert_array_equal, point, end.params)


def test_a_combination_is_the_model_of_the_combined_tree_streamed_or_not(one_device):
    models, coefficients = [BASE, FT, tiny.model(ARCH, 2)], np.array([[0.2, 1.1, -0.3], [0.0, 0.0, 1.0]])
    found = combination_losses(models, coefficients, TOKENS, ALL, one_device)
    for losses, (a, b, c) in zip(found, coefficients, strict=True):
        params = jax.tree.map(lambda x, y, z, a=a, b=b, c=c: a * x + b * y + c * z, *(model.params for model in models))
        np.testing.assert_allclose(losses, token_losses(InMemory(ARCH, params), TOKENS, one_device), atol=1e-4)
    streamed = [MappedSource(model, lambda subtree, _: subtree) for model in models]
    np.testing.assert_array_equal(combination_losses(streamed, coefficients, TOKENS, ALL, one_device), found)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny.qwen3_gqa, tiny.gpt2, tiny.mixtral], ids=lambda make: make.__name__)
def test_the_loss_that_is_trained_is_the_one_that_is_reported(make, one_device):
    base, ft, middle = (tiny.model(make(), seed) for seed in range(3))
    moved = interpolated_leaves(axis_table(base.arch), ALL)
    other, leaves = ({name: flatten(model.params)[name] for name in moved} for model in (ft, middle))
    for t in (0.2, 0.7):
        trained = loss_on_curve(base.arch, leaves, (base.params, other), np.float32(t), TOKENS[:8])
        reported = combination_losses([base, ft, middle], on_bezier(np.array([t])), TOKENS[:8], ALL, one_device)
        assert trained == pytest.approx(reported.mean(), abs=1e-4)


def test_training_lowers_the_barrier_and_holds_the_ends(one_device):
    groups, training = path_groups(False, False), BezierTraining(steps=24, batch_size=8)
    found = trained_midpoint(BASE, FT, TOKENS, groups, training, one_device)
    again = trained_midpoint(BASE, FT, TOKENS, groups, training, one_device)
    assert found.barriers == again.barriers
    assert found.barriers[0] > min(found.barriers)
    assert found.best_step > 0
    moved = interpolated_leaves(axis_table(ARCH), groups)
    assert flatten(found.parameters.params).keys() == moved
    models = [BASE, FT, found.parameters]
    curved = combination_losses(models, on_bezier(ALPHAS), TOKENS, groups, one_device)
    straight = path_losses(BASE, FT, TOKENS, ALPHAS, groups, one_device)
    np.testing.assert_array_equal(curved[[0, -1]], straight[[0, -1]])
    assert curved[2].mean() < straight[2].mean()


def test_too_little_text_trains_nothing(one_device):
    with pytest.raises(ValueError, match="5 blocks of text to train a curve on, expected at least 32"):
        trained_midpoint(BASE, FT, TOKENS[:5], ALL, BezierTraining(), one_device)


def test_a_curve_is_refused_where_models_are_streamed_or_the_text_is_random():
    asked = {"base_model_id": "a", "ft_model_id": "b", "mode": {"path": "bezier"}}
    with pytest.raises(ConfigError) as refused:
        check_options(RunOptions.from_config(asked | {"memory": "stream", "dataset": "random"}))
    assert "mode.path=bezier: the gradient of a loss between the models needs all layers" in str(refused.value)
    assert "mode.path=bezier: random tokens teach nothing" in str(refused.value)
    check_options(RunOptions.from_config(asked | {"stat": "csu", "memory": "stream"}))  # which draws no curve


@pytest.mark.slow
def test_a_run_reports_the_curve_beside_the_straight_path(quick_config, monkeypatch):
    config = quick_config(ft="independent")
    config.mode.path, config.learned.steps = "bezier", 60
    record = trace(config)
    result = record["statistics"]["mode"]["non_aligned"]
    straight, curved = result["curve"], result["curve"]["more"]["bezier"]
    assert curved["loss"][0] == pytest.approx(straight["loss"][0], abs=1e-6)
    assert curved["loss"][-1] == pytest.approx(straight["loss"][-1], abs=1e-6)
    assert curved["barrier"] < straight["barrier"] - 0.05
    assert result["headline"] == straight["midpoint"]
    assert {NO_DESCENT, further_note("bezier", "none")} <= set(result["notes"])
    assert record["verdict"]["verdict"] == "not_asked"  # however low the curve is
    monkeypatch.setattr("tracing_jax.experiment.memory.free_bytes", lambda mesh: 1000)
    with pytest.raises(ConfigError, match=r"mode.path=bezier: the gradient .* 9.31e-07 GiB are free"):
        trace(config)


@pytest.mark.slow
def test_a_curve_leaves_an_alignment_by_activations_as_it_is_and_follows_one_that_makes_models_comparable(quick_config):
    def run(path, **fields):
        config = quick_config(path, "disguised", align=True, align_axes=("all",), disguise="identity", **fields)
        config.mode.path, config.learned.steps = path, 2
        return trace(config)

    straight, curved = (run(path, align_evidence="activations") for path in ("linear", "bezier"))
    assert curved["alignment"]["objective"] == straight["alignment"]["objective"]
    mode = curved["statistics"]["mode"]
    assert "non_aligned" not in mode or mode["non_aligned"].get("not_applicable")  # one layer more than base
    assert mode["aligned"]["curve"]["more"]["bezier"]["loss"]


def test_the_figure_has_a_thinner_line_for_each_further_curve(drawn):
    curve = {"alpha": [0.0, 0.5, 1.0], "loss": [2.0, 3.0, 2.0]}
    axes = Figure().subplots()
    draw_path(axes, {"pair": curve | {"more": {"bezier": {**curve, "loss": [2.0, 2.1, 2.0]}}}})
    main, further = axes.lines
    assert further.get_color() == main.get_color()
    assert further.get_linestyle() != main.get_linestyle()
    assert further.get_label() == "pair, Bézier curve"
    np.testing.assert_array_equal(further.get_ydata(), [2.0, 2.1, 2.0])
