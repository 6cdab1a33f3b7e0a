"""Losses at the best temperature: the grid against scaled heads, the fit against parabolas, and what a run reports."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_statistics import pair_of

import tracing_jax as tj
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment import trace
from tracing_jax.experiment.validation import check_options
from tracing_jax.forward import INVERSE_TEMPERATURES, calibrated, path_losses, scaled_path_losses, token_losses
from tracing_jax.forward.temperature import at_scale, best_scale
from tracing_jax.interpolation import path_groups
from tracing_jax.options import RunOptions
from tracing_jax.report.page import html
from tracing_jax.report.printed import path_rows
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, MappedSource
from tracing_jax.statistics.mode import Mode, further_note

ARCH = tiny.llama_mha()
ALL, ALPHAS = path_groups(attn=True, emb=True), np.array([0.0, 0.5, 1.0])
BASE, FT = tiny.model(ARCH, 0), tiny.model(ARCH, 1)
TOKENS = np.random.default_rng(0).integers(61, size=(5, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def one_device():
    return Compute(make_mesh(1, 1), batch_size=4)


def with_scaled_head(model, scale):
    head = model.params["head"]
    kernel = head["lm_head"]["kernel"] * scale
    return InMemory(model.arch, model.params | {"head": head | {"lm_head": head["lm_head"] | {"kernel": kernel}}})


def test_losses_at_a_scale_are_those_of_a_head_that_is_so_much_larger(one_device):
    scales = np.array([0.25, 1.0, 3.0])
    losses, scaled = scaled_path_losses(BASE, FT, TOKENS, ALPHAS, ALL, one_device, scales)
    np.testing.assert_allclose(losses, path_losses(BASE, FT, TOKENS, ALPHAS, ALL, one_device), atol=1e-6)
    np.testing.assert_allclose(scaled[..., 1], losses.mean(-1), atol=1e-5)
    for column, scale in zip(np.moveaxis(scaled, -1, 0), scales, strict=True):
        for row, model in ((0, BASE), (2, FT)):
            expected = token_losses(with_scaled_head(model, jnp.float32(scale)), TOKENS, one_device).mean(-1)
            np.testing.assert_allclose(column[row], expected, atol=2e-5)


@pytest.mark.slow
def test_streamed_equals_resident(one_device):
    streamed = [MappedSource(model, lambda subtree, _: subtree) for model in (BASE, FT)]
    for found, expected in zip(*(
        scaled_path_losses(*pair, TOKENS, ALPHAS, ALL, one_device, INVERSE_TEMPERATURES)
        for pair in (streamed, (BASE, FT))
    ), strict=True):  # fmt: skip
        np.testing.assert_array_equal(found, expected)


def test_the_fit_is_exact_on_parabolas_and_never_above_a_point_of_the_grid():
    logs = np.log2(INVERSE_TEMPERATURES)
    minima = np.array([-1.1, 0.0, 0.37, 1.99])
    parabolas = 2 + (logs - minima[:, None]) ** 2
    center, offset = best_scale(parabolas)
    np.testing.assert_allclose(logs[center] + 0.25 * offset, minima, atol=1e-12)
    np.testing.assert_allclose(at_scale(parabolas, center, offset), 2, atol=1e-12)
    rough = np.random.default_rng(0).normal(size=(200, len(logs)))
    assert (at_scale(rough, *best_scale(rough)) <= rough.min(axis=1) + 1e-12).all()
    rising = np.stack([logs, -logs])
    np.testing.assert_allclose(at_scale(rising, *best_scale(rising)), rising.min(axis=1))  # at the ends of the grid


def test_each_half_has_the_temperature_of_the_other():
    logs = np.log2(INVERSE_TEMPERATURES)
    blocks = np.stack([1 + (logs - 0.5) ** 2, 3 + (logs + 0.5) ** 2, 1 + (logs - 0.5) ** 2])
    found = calibrated(blocks[None])
    assert found.loss == pytest.approx([(1 + 1 + 3 + 1) / 2])  # a step of the other half's minimum costs 1 in each
    assert found.temperature == pytest.approx([1.0])
    with pytest.raises(ValueError, match="1 block of text has no two halves"):
        calibrated(blocks[None, :1])


def test_the_parabola_is_close_to_the_loss_between_the_points_of_the_grid(one_device):
    _, scaled = scaled_path_losses(BASE, FT, TOKENS, ALPHAS, ALL, one_device, INVERSE_TEMPERATURES)
    center, offset = best_scale(scaled.mean(axis=1))
    exact = INVERSE_TEMPERATURES[center] * 2 ** (offset / 4)
    _, between = scaled_path_losses(BASE, FT, TOKENS, ALPHAS, ALL, one_device, exact)
    found = at_scale(scaled.mean(axis=1), center, offset)
    np.testing.assert_allclose(np.diagonal(between.mean(axis=1)), found, atol=1e-3)


@pytest.mark.slow
def test_a_scaled_head_changes_the_temperature_and_not_the_calibrated_curve(family, one_device):
    base, ft = (tj.load(family.member(name)) for name in ("base", "finetune"))
    tokens = tj.tokenize(family.member("base"), family.text, block_size=64, num_tokens=512)
    pair = dataclasses.replace(pair_of(base, ft), tokens=tokens, compute=one_device)
    pairs = [pair, dataclasses.replace(pair, ft=with_scaled_head(ft, 2.0))]
    statistic = Mode(alphas=(1.0,), attn=True, emb=True, calibrate=True)
    plain, scaled = (statistic.compute(pair).curve for pair in pairs)
    one, other = (curve.more["calibrated"] for curve in (plain, scaled))
    assert 0.5 < one["temperature"][-1] < 2
    assert other["loss"][-1] == pytest.approx(one["loss"][-1], abs=1e-4)
    assert other["temperature"][-1] == pytest.approx(2 * one["temperature"][-1], rel=1e-3)
    assert scaled.loss[-1] > plain.loss[-1] + 0.05
    assert one["barrier"] == pytest.approx(max(one["loss"][1] - (one["loss"][0] + one["loss"][2]) / 2, 0))


def test_text_of_one_block_is_not_calibrated():
    with pytest.raises(ConfigError, match=r"mode\.calibrate: num_tokens=512 is one block"):
        check_options(RunOptions.from_config({"base_model_id": "a", "ft_model_id": "b", "num_tokens": 512,
                                              "mode": {"calibrate": True}}))  # fmt: skip


@pytest.mark.slow
def test_a_run_reports_the_calibrated_curve(quick_config):
    config = quick_config(ft="independent")
    config.mode.calibrate = True
    record = trace(config)
    result = record["statistics"]["mode"]["non_aligned"]
    straight, other = result["curve"], result["curve"]["more"]["calibrated"]
    assert other["alpha"] == straight["alpha"]
    assert len(other["temperature"]) == 3
    assert other["loss"][1] < straight["loss"][1]
    assert further_note("calibrated", "none") in result["notes"]
    assert "calibrated: temperature at each α" in html(record)
    rows = path_rows(record)
    assert [row[2] for row in rows] == ["non-aligned", "non-aligned, calibrated"]
    assert rows[1][-2] == round(other["barrier"], 3)
