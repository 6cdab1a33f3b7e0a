"""The models: fresh weights are those of Flax linen, and the forward pass reads the leaves of the axis table."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parity_cases import CASES

from tracing_jax.axes import axis_table
from tracing_jax.models import Carried, apply_block, apply_embed, apply_head, apply_per_layer, init_params, layer_inputs
from tracing_jax.tree import flatten, unflatten

ARCHS = [tiny.llama_mha(), tiny.qwen3_gqa(), tiny.olmo2_gqa(), tiny.gemma_mqa(), tiny.gpt2(), tiny.mixtral()]


class Module(nn.Module):
    """A linen module whose params have these shapes: modules of modules down to leaves."""

    shapes: Any

    @nn.compact
    def __call__(self):
        for name, shape in self.shapes.items():
            if isinstance(shape, Mapping):  # linen freezes the dicts of its fields
                Module(shape, name=name)()
            else:
                self.param(name, nn.initializers.normal(0.02), shape)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.family)
def test_fresh_kernels_are_those_that_linen_draws(arch):
    table, key = axis_table(arch), jax.random.key(7)
    shapes = {name: tuple(table.sizes[axis] for axis in row.axes) for name, row in table.leaves.items()}
    params = flatten(init_params(arch, key))
    assert {name: leaf.shape for name, leaf in params.items()} == shapes
    parts = ["embed/", "head/", *(f"layers/{i}/" for i in range(arch.num_layers))]
    drawn = {}
    for part, part_key in zip(parts, jax.random.split(key, len(parts)), strict=True):
        own = unflatten({name.removeprefix(part): shape for name, shape in shapes.items() if name.startswith(part)})
        drawn |= {part + name: leaf for name, leaf in flatten(Module(own).init(part_key)["params"]).items()}
    for name, leaf in params.items():
        if name.endswith(("kernel", "embedding", "positions")):
            np.testing.assert_array_equal(leaf, drawn[name], err_msg=name)
        else:
            neutral = float(name.endswith("scale") and arch.norm != "rms_unit_offset")
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, neutral), err_msg=name)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith(("-linear", "-llama3"))])
def test_forward_pass_reads_the_leaves_of_the_axis_table_and_no_others(name):
    arch = CASES[name].arch()
    table = axis_table(arch)
    shapes = {leaf: tuple(table.sizes[axis] for axis in row.axes) for leaf, row in table.leaves.items()}

    def logits(leaves):
        params = {"head": {}} | unflatten(leaves)  # a leaf that the table lacks would be missing here
        x = apply_embed(arch, params["embed"], jnp.zeros((1, 3), jnp.int32), jnp.float32)
        carried = Carried(apply_per_layer(arch, params["embed"], jnp.zeros((1, 3), jnp.int32), x), {})
        for i in range(arch.num_layers):
            output = apply_block(arch, params["layers"][str(i)], x, layer_inputs(arch, i), carried=carried)
            x, carried = output.hidden, output.carried
        return apply_head(arch, params["head"], x, params["embed"]["embedding"])

    program = jax.make_jaxpr(logits)({leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in shapes.items()})
    read = {variable for equation in program.eqns for variable in equation.invars if not hasattr(variable, "val")}
    unread = [leaf for leaf, variable in zip(sorted(shapes), program.jaxpr.invars, strict=True) if variable not in read]
    assert not unread
