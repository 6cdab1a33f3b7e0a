"""Our numbers are those of transformers: in golden files, and live where torch is installed."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import slow
from make_golden import FOLDER, hf_model, hf_outputs, tensor_shapes
from parity_cases import CASES, FAMILIES, GOLDEN, LIVE_CASES, Case, leaf_of
from scipy.special import logsumexp

from tracing_jax.axes import axis_table, check
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import tensor_shapes as entry_shapes
from tracing_jax.checkpoint.tensor_layout import to_tensors
from tracing_jax.forward import logits, token_losses
from tracing_jax.models import apply_embed
from tracing_jax.models.layers import scaled
from tracing_jax.sharding import Compute, make_mesh

LOGITS_TOLERANCE = 2e-4  # times the larger of 1 and the largest logit
LOSSES_TOLERANCE = 1e-4  # nats

_FILES = {name: np.load(FOLDER / f"{name}.npz") for name in GOLDEN}
_LOGITS, _LOSSES, _TENSORS = (
    {name: value for file in _FILES.values() for name, value in zip(file["names"].tolist(), file[key], strict=True)}
    for key in ("logits", "losses", "tensors")
)


# Of the combinations of head layout, tied or untied, and rope each family has one, by turns, so that each value occurs.
# All options; of the mixtures those that between them have every kind of router, and latents.
_SLOW = {
    case.name for file in ("parity_mixtures", "parity_hybrids", "parity_gemma4") for case in GOLDEN[file]
} - {
    "qwen2_moe-every_other", "gpt_oss-default", "deepseek_v3-groups", "phimoe-biases", "llama4_text-default",
    "gemma4_text-shared_keys",
}  # fmt: skip
_PRODUCT = re.compile(r"-(mha|gqa|mqa)-(tied|untied)-(default|linear|llama3)$")
_TURNS = (("mha", "tied", "llama3"), ("gqa", "untied", "default"), ("mqa", "tied", "linear"))


def _is_quick(case: Case) -> bool:
    found = _PRODUCT.search(case.name)
    turn = _TURNS[FAMILIES.index(case.family) % len(_TURNS)]
    return case.name not in _SLOW and (found is None or found.groups() == turn)


QUICK = [case for case in CASES.values() if _is_quick(case)]
REST = [case for case in CASES.values() if case not in QUICK]


def _of_family(family: str) -> list[Case]:
    return [case for case in CASES.values() if case.family == family]


def _disagreement(case: Case, found_logits: np.ndarray, found_losses: np.ndarray) -> str | None:
    return _difference(case, found_logits[0], found_losses, _LOGITS[case.name], _LOSSES[case.name])


def _difference(
    case: Case, found_logits: np.ndarray, found_losses: np.ndarray, wanted_logits: np.ndarray, wanted_losses: np.ndarray
) -> str | None:
    logits_error = np.abs(found_logits - wanted_logits).max() / max(1.0, np.abs(wanted_logits).max())
    losses_error = np.abs(found_losses - wanted_losses).max()
    if logits_error <= LOGITS_TOLERANCE and losses_error <= LOSSES_TOLERANCE:
        return None
    return f"{case.name}: logits off by {logits_error:.2g} (relative), losses by {losses_error:.2g} nats"


def _engine_outputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    source = case.source()
    return logits(source, case.tokens()), token_losses(source, case.tokens(), Compute(make_mesh()))


def _outputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    # The engine's losses differ from its logits only by the head: one head layout, tied and untied, will do.
    if "-gqa-" in case.name:
        return _engine_outputs(case)
    found, tokens = logits(case.source(), case.tokens()), case.tokens()
    picked = np.take_along_axis(found[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return found, logsumexp(found[:, :-1], axis=-1) - picked


def test_golden_file_holds_every_case():
    for name, cases in GOLDEN.items():
        assert [case.name for case in cases] == _FILES[name]["names"].tolist(), f"run tests/make_golden.py {name}"


@pytest.mark.parametrize("cases", [QUICK[::2], QUICK[1::2], *(slow(REST[i::4]) for i in range(4))])
def test_logits_and_losses_equal_those_of_transformers(cases):
    disagreements = [_disagreement(case, *_outputs(case)) for case in cases]
    assert not any(disagreements), "\n".join(filter(None, disagreements))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    "name",
    ["llama-gqa-tied-default", "gemma2-gqa-tied-linear", "gpt2-inner", "mixtral-no_window", "deepseek_v2-groups",
     "qwen3_next-default"],
)  # fmt: skip
def test_programs_compiled_as_users_do_give_the_same_numbers(name):
    found = logits(CASES[name].source(), CASES[name].tokens())
    assert _disagreement(CASES[name], found, _LOSSES[name]) is None


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_installed_transformers_still_gives_the_golden_numbers(family):
    disagreements = []
    for case in _of_family(family):
        model = hf_model(case)
        assert tensor_shapes(model) == _golden_shapes(case)
        disagreements.append(_disagreement(case, *hf_outputs(model, case.tokens())))
    assert not any(disagreements), "\n".join(filter(None, disagreements))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.optimized
@pytest.mark.parametrize("family", dict.fromkeys(case.family for case in LIVE_CASES.values()))
def test_further_options_give_the_numbers_of_transformers(family):
    disagreements = []
    for case in (case for case in LIVE_CASES.values() if case.family == family):
        model = hf_model(case)
        assert tensor_shapes(model) == entry_shapes(leaf_layouts(case.arch()).values()), case.name
        check(case.source().params, axis_table(case.arch()))
        with jax.disable_jit():
            found = _outputs(case)
        disagreements.append(_difference(case, *found, *hf_outputs(model, case.tokens())))
    assert not any(disagreements), "\n".join(filter(None, disagreements))


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_has_an_entry_for_every_tensor_of_transformers(family):
    for case in _of_family(family):
        layouts = leaf_layouts(case.arch()).values()
        assert entry_shapes(layouts) == _golden_shapes(case), case.name
        slices = [(part.tensor, part.axis, part.start, part.stop) for layout in layouts for part in layout.slices]
        assert len(set(slices)) == len(slices)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_leaves_and_tensors_are_one_another_bit_for_bit(family, dtype):
    for case in _of_family(family):
        layouts = leaf_layouts(case.arch())
        shapes = entry_shapes(layouts.values())
        tensors = {name: case.weight(name, shape).astype(dtype) for name, shape in shapes.items()}
        leaves = {name: leaf_of(layout, tensors) for name, layout in layouts.items()}
        assert {name: leaf.shape for name, leaf in leaves.items()} == {n: e.shape for n, e in layouts.items()}
        again = to_tensors(layouts, leaves)
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert again[name].dtype == dtype
            assert again[name].flags.c_contiguous
            assert again[name].tobytes() == tensor.tobytes(), (case.name, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_leaves_fit_the_axis_table(family):
    for case in _of_family(family):
        source = case.source()
        check(source.params, axis_table(source.arch))


def test_constants_round_as_in_transformers_in_bfloat16():
    x = jnp.linspace(-3, 3, 64, dtype=jnp.bfloat16)
    exact = (np.asarray(x, np.float32) * np.float32(0.22)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(scaled(x, 0.22)), exact)  # Granite's residual multiplier is not rounded
    case = CASES["gemma-attention_bias"]
    embed, tokens = case.source().embed(), jnp.asarray(case.tokens())
    rounded = ml_dtypes.bfloat16(24**0.5)  # Gemma's embedding scale is
    table = np.asarray(embed["embedding"]).astype(ml_dtypes.bfloat16)
    found = apply_embed(case.arch(), embed, tokens, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found), table[case.tokens()] * rounded)


def _golden_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in json.loads(str(_TENSORS[case.name])).items()}
