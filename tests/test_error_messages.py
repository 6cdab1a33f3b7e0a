"""Error messages are grouped and bounded, and say how much they leave out."""

import pytest

from tracing_jax.arch import UnsupportedModelError
from tracing_jax.checkpoint import CheckpointError
from tracing_jax.error_messages import grouped, joined, listed, shortened


def test_lines_that_differ_in_numbers_of_layers_are_one():
    lines = [f"missing tensor model.layers.{i}.mlp.up.weight (40, 24)" for i in range(32)]
    assert grouped(lines) == ["missing tensor model.layers.{0..31}.mlp.up.weight (40, 24) (32 of them)"]
    assert grouped(lines[:1]) == lines[:1]
    some = [f"layers/{i}/mlp and h.{e}" for i in (0, 2, 5) for e in (0, 1)]
    assert grouped(some) == ["layers/{0,2,5}/mlp and h.{0..1} (6 of them)"]


def test_lines_with_other_shapes_or_names_stay_apart():
    lines = ["tensor h.0.w (4, 5)", "tensor h.1.w (4, 6)", "tensor h2.w", "tensor h3.w"]
    assert grouped(lines) == lines


def test_a_long_message_says_what_it_leaves_out():
    text = joined([f"problem {'x' * 90} {i}" for i in range(1000)])
    assert len(text) < 4000
    shown = text.count("problem")
    assert text.endswith(f"- and {1000 - shown} more")
    assert joined(["one"]) == "one"
    assert joined(["one", "two"]) == "- one\n- two"


@pytest.mark.parametrize("error", [CheckpointError, UnsupportedModelError])
def test_no_error_is_longer_than_it_may_be(error):
    assert len(str(error("a" * 100_000))) < 4000
    assert len(str(error(*("b" * 3000 for _ in range(50))))) < 4000
    assert str(error("short")) == "short"


def test_names_are_shortened_in_the_middle():
    assert shortened("a\nb") == "a b"
    assert len(shortened("x" * 10_000)) < 130
    assert listed(range(10), 3) == "0, 1, 2 and 7 more"
