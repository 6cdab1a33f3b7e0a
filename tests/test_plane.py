"""The plane through three models: coordinates, losses at the corners and on the edges, what is refused, the figure."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from derived_models import derived, without_layer

from tracing_jax import cli
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment import trace
from tracing_jax.experiment.planes import Plane, plane_report, plane_through
from tracing_jax.interpolation import path_groups
from tracing_jax.options import Mode, RunOptions
from tracing_jax.report.planes import plane_figure
from tracing_jax.sources import InMemory, MappedSource
from tracing_jax.tree import flatten

ALL = path_groups(attn=True, emb=True)
MODELS = [tiny.model(tiny.llama_mha(), seed) for seed in range(3)]


def flat(model):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in flatten(model.params).values()])


def test_distances_in_the_plane_are_those_of_the_weights():
    corners = plane_through(MODELS, ALL).corners
    for i, k in ((0, 1), (0, 2), (1, 2)):
        expected = np.linalg.norm(flat(MODELS[i]) - flat(MODELS[k]))
        assert np.linalg.norm(corners[i] - corners[k]) == pytest.approx(expected, rel=1e-9)
    streamed = [MappedSource(model, lambda subtree, _: subtree) for model in MODELS]
    np.testing.assert_array_equal(plane_through(streamed, ALL).corners, corners)
    assert plane_through(MODELS, path_groups(False, False)).base < corners[1, 0]  # of fewer weights


def test_coefficients_are_exact_at_the_models_and_sum_to_the_point_elsewhere():
    plane = plane_through(MODELS, ALL)
    np.testing.assert_allclose(plane.coefficients(plane.corners), np.eye(3), atol=1e-12)
    points = np.random.default_rng(0).normal(size=(4, 5, 2))
    found = plane.coefficients(points)
    np.testing.assert_allclose(found.sum(-1), 1)
    np.testing.assert_allclose(found @ plane.corners, points, atol=1e-12)
    weights = [flat(model) for model in MODELS]
    at = [c @ np.stack(weights) for c in found[0]]  # distances between points are those of their weights, too
    assert np.linalg.norm(at[0] - at[1]) == pytest.approx(np.linalg.norm(points[0, 0] - points[0, 1]), rel=1e-9)


def test_models_on_one_line_have_no_plane():
    half = InMemory(MODELS[0].arch, jax.tree.map(lambda a, b: (a + b) / 2, MODELS[0].params, MODELS[1].params))
    for models in ([*MODELS[:2], half], [*MODELS[:2], MODELS[1]], [MODELS[0], MODELS[0], MODELS[2]]):
        with pytest.raises(ConfigError, match="the three models are on one line"):
            plane_through(models, ALL)


@pytest.fixture(scope="module")
def options(family):
    return RunOptions(
        base_model_id=str(family.member("base")), ft_model_id=str(family.member("finetune")),
        dataset=str(family.text), num_tokens=256, block_size=64, batch_size=4, mode=Mode(attn=True, emb=True),
    )  # fmt: skip


@pytest.mark.slow
def test_corners_are_the_models_and_edges_are_paths(family, options):
    record = plane_report(options, str(family.member("independent")), 3, 0.0).record
    for edge, (one, other) in {"A to B": ("base", "finetune"), "B to C": ("finetune", "independent")}.items():
        path = RunOptions(
            base_model_id=str(family.member(one)), ft_model_id=str(family.member(other)), dataset=options.dataset,
            num_tokens=256, block_size=64, batch_size=4, mode=options.mode, save=None,
        )  # fmt: skip
        curve = trace(path)["statistics"]["mode"]["non_aligned"]["curve"]
        np.testing.assert_allclose(record["edges"][edge]["loss"], curve["loss"], atol=1e-4)
        assert record["losses"][edge[0]] == pytest.approx(curve["loss"][0], abs=1e-5)
        assert record["losses"][edge[-1]] == pytest.approx(curve["end_loss_ft_own"], abs=1e-4)
    assert record["lowest"]["loss"] == np.min(record["loss"])


@pytest.mark.slow
def test_the_verb_writes_record_and_figure(family, tmp_path, monkeypatch, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    names = [str(family.member(name)) for name in ("base", "finetune", "independent")]
    few = ["--grid=4", f"--dataset={family.text}", "--num_tokens=256", "--block_size=64"]
    cli.main(["plane", *names, *few])
    shown = capsys.readouterr().out
    assert "lowest of 4 x 4 points" in shown
    assert "no evidence of descent" in shown
    record = json.loads((tmp_path / "runs/plane.json").read_text())
    assert np.shape(record["loss"]) == (4, 4)
    assert (tmp_path / "runs/plane.png").read_bytes()[:4] == b"\x89PNG"


def test_models_of_other_shapes_are_refused_before_weights_are_read(options, tmp_path):
    base = Path(options.base_model_id)
    shallow = derived(base, tmp_path / "shallow", lambda leaves: without_layer(leaves, 0), num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"no plane through A and C, .*shallow: different depth: 2 and 1 layers"):
        plane_report(options, str(shallow), 3, 0.0)


def test_the_figure_marks_the_models_and_takes_losses_that_are_not_finite():
    corners = Plane(2.0, 1.0, 1.5).corners.tolist()
    edge = {"loss": [2.0, 3.0, 2.5]}
    record = {
        "asked": {name: f"org/$model_{name}" for name in "ABC"}, "corners": dict(zip("ABC", corners)),
        "losses": {"A": 2.0, "B": 2.5, "C": 3.0}, "edges": {"A to B": edge}, "x": [-1.0, 0.0, 2.0], "y": [0.0, 1.0],
        "loss": [[2.0, "nan", 90.0], [2.0, "inf", 3.0]],
    }  # fmt: skip
    axes, bar = plane_figure(record).axes
    assert [text.get_text() for text in axes.texts] == [
        "A: $model_A\n2.000", "B: $model_B\n2.500", "C: $model_C\n3.000"
    ]  # fmt: skip
    assert "darkest: 4.5 and above" in bar.get_ylabel()
