"""Quantised weights are what their formats say, whole and slice by slice; what is not known is refused by its name."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from parity_cases import CASES
from test_tensors import header_only

from tracing_jax.checkpoint import CheckpointError, open_checkpoint
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.quantised import dequantised
from tracing_jax.checkpoint.safetensors_file import SafetensorsFile
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.checkpoint.tensors import TensorStore

RNG = np.random.default_rng(0)
W = "model.layers.0.mlp.up_proj.weight"
STEM = W.removesuffix("weight")
FP8 = ml_dtypes.float8_e4m3fn
_NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "uint32": "U32",
}  # fmt: skip


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Writes a safetensors file; the package's own writer knows no 8-bit floats of numpy."""
    sizes = {name: (_NAMES[a.dtype.name], list(a.shape), a.nbytes) for name, a in tensors.items()}
    header_only(path, **sizes)
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())
    header = path.read_bytes()
    path.write_bytes(header[: len(header) - len(data)] + data)
    return path


def opened(tmp_path: Path, tensors: dict[str, np.ndarray], **settings: Any) -> TensorStore:
    stored = SafetensorsFile(save(tmp_path / "model.safetensors", tensors))
    store, notes = dequantised(stored, {"quantization_config": settings} if settings else {})
    assert notes
    return store


def expect(store: TensorStore, expected: np.ndarray, name: str = W) -> None:
    """The tensor and slices of it, in and across blocks, equal the expected numbers exactly."""
    assert store.names() == (name,)
    assert store.shape(name) == expected.shape
    axes = expected.ndim
    spans = [slice(None), slice(1, 2), slice(3, 21), slice(7, 40), slice(0, 0)]
    for index in [(), *((slice(None),) * axis + (span,) for axis in range(axes) for span in spans), (spans[2],) * axes]:
        found = store.read(name, index)
        assert found.dtype == store.dtype(name)
        np.testing.assert_array_equal(found, expected[index].astype(found.dtype), err_msg=str(index))
        out = np.full(found.shape, 7, found.dtype)
        store.read_into(out, name, index)
        np.testing.assert_array_equal(out, found)


def floats8(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(FP8)


# FP8 and int8


def test_fp8_in_blocks_that_do_not_divide_the_axes(tmp_path):
    weight, scales = floats8(40, 24), RNG.normal(size=(3, 2)).astype(np.float32)
    expected = np.array(
        [[np.float32(weight[i, j]) * scales[i // 16, j // 16] for j in range(24)] for i in range(40)], np.float32
    )
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    expect(opened(tmp_path, {W: weight, f"{W}_scale_inv": scales}, **settings), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (40,), (40, 1)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fp8_per_tensor_and_per_row(shape, dtype, tmp_path):
    weight, scales = floats8(40, 24), RNG.normal(size=shape).astype(dtype)
    wide = scales.astype(np.float32)
    expected = weight.astype(np.float32) * (wide.reshape(-1, 1) if 40 in shape else wide.reshape(()))
    expect(opened(tmp_path, {W: weight, f"{W}_scale": scales}, quant_method="compressed-tensors"), expected)


@pytest.mark.parametrize("scales_name", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.float8_e8m0fnu])
def test_fp8_with_scales_that_are_powers_of_two(scales_name, dtype, tmp_path):
    weight, exponents = floats8(40, 64), RNG.integers(100, 140, size=(40, 2)).astype(np.uint8)
    expected = weight.astype(np.float32) * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, axis=1)
    parts = {W: weight, f"{STEM}{scales_name}": exponents.view(dtype), f"{STEM}qscale_act": np.ones((), np.float32)}
    store = opened(tmp_path, parts, quant_method="mxfp8", weight_block_size=[1, 32], scale_fmt="ue8m0")
    assert set(store.names()) == {W, f"{STEM}qscale_act"}
    np.testing.assert_array_equal(store.read(W), expected)
    np.testing.assert_array_equal(store.read(W, (slice(3, 9), slice(30, 37))), expected[3:9, 30:37])


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "block"), [(FP8, (16, 16)), (FP8, (1, 32)), (np.int8, (1, 32))])
def test_fp8_and_fp4_with_exponents_equal_transformers(kind, block, tmp_path):
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    bytes_ = RNG.integers(0, 120, size=(64, 96)).astype(np.uint8)
    width = 96 * (2 if kind == np.int8 else 1)
    scales = RNG.integers(110, 134, size=(64 // block[0], width // block[1])).astype(np.uint8)
    weight = torch.tensor(bytes_).view(torch.int8 if kind == np.int8 else torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None).convert(
        {"weight": [weight], "weight_scale_inv": [torch.tensor(scales)]}, full_layer_name="w"
    )["w"]
    store = opened(tmp_path, {W: bytes_.view(kind), f"{STEM}scale": scales}, quant_method="fp8")
    np.testing.assert_array_equal(
        store.read(W).astype(ml_dtypes.bfloat16), theirs.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    )


def test_exponents_are_all_read(tmp_path):
    """Every byte is a power of two, down to the smallest, but the last, which is no number."""
    parts = {W: np.ones((256, 1), FP8), f"{W}_scale": np.arange(256, dtype=np.uint8)[:, None]}
    found = opened(tmp_path, parts).read(W)[:, 0].astype(np.float64)
    np.testing.assert_array_equal(found[:-1], 2.0 ** np.arange(-127, 128))
    assert np.isnan(found[-1])


def test_fp8_without_scales_is_what_its_values_say(tmp_path):
    weight = RNG.normal(size=(40, 24)).astype(ml_dtypes.float8_e5m2)
    expect(opened(tmp_path, {W: weight}), weight.astype(np.float32))


def test_fp8_of_stacked_experts(tmp_path):
    weight, scales = floats8(3, 32, 48), RNG.normal(size=(3, 2, 3)).astype(np.float32)
    expected = weight.astype(np.float32) * np.repeat(np.repeat(scales, 16, 1), 16, 2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    store = opened(tmp_path, {name: weight, f"{name}_scale_inv": scales}, weight_block_size=[16, 16])
    expect(store, expected, name)


def test_int8_of_bitsandbytes_and_of_compressed_tensors(tmp_path):
    weight, largest = RNG.integers(-127, 128, size=(40, 24)).astype(np.int8), RNG.random(40).astype(np.float32)
    factor = np.float32(1 / 127)
    parts = {W: weight, f"{STEM}SCB": largest, f"{STEM}weight_format": np.zeros((), np.uint8)}
    expect(opened(tmp_path, parts, load_in_8bit=True), weight * (largest * factor)[:, None])
    with pytest.raises(CheckpointError, match=r"weight_format is \[3\]: .*tiles"):
        opened(tmp_path, parts | {f"{STEM}weight_format": np.full((), 3, np.uint8)}, load_in_8bit=True)
    scales = RNG.random((40, 1)).astype(np.float32)
    expect(opened(tmp_path, {W: weight, f"{W}_scale": scales}), weight * scales)
    zeros = RNG.integers(-128, 128, size=(40, 1)).astype(np.int8)
    expected = (weight.astype(np.int32) - zeros) * scales
    expect(opened(tmp_path, {W: weight, f"{W}_scale": scales, f"{W}_zero_point": zeros}), expected.astype(np.float32))


# 4-bit floats


def e2m1(code: int) -> float:
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    magnitude = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def test_mxfp4_blocks_and_scales(tmp_path):
    blocks = RNG.integers(0, 256, size=(2, 24, 2, 16)).astype(np.uint8)
    scales = RNG.integers(120, 134, size=(2, 24, 2)).astype(np.uint8)
    expected = np.zeros((2, 64, 24), np.float32)
    for e, row, group, byte in np.ndindex(blocks.shape):
        for half in range(2):
            code = int(blocks[e, row, group, byte]) >> 4 * half & 15
            value = e2m1(code) * 2.0 ** (int(scales[e, row, group]) - 127)
            expected[e, group * 32 + 2 * byte + half, row] = value
    name = "model.layers.0.mlp.experts.gate_up_proj"
    store = opened(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}, quant_method="mxfp4")
    expect(store, expected, name)


@pytest.mark.parametrize(("kind", "scales_name"), [(np.uint8, "weight_scale"), (np.int8, "scale")])
def test_mxfp4_in_rows(kind, scales_name, tmp_path):
    """The layouts of compressed-tensors and of DeepSeek-V4's experts."""
    packed = RNG.integers(0, 256, size=(40, 32)).astype(np.uint8)
    scales = RNG.integers(120, 134, size=(40, 2)).astype(np.uint8)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(40, 64)
    expected = np.vectorize(e2m1)(codes) * np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, 1)
    stored = W if kind == np.int8 else f"{W}_packed"
    parts = {stored: packed.view(kind), f"{STEM}{scales_name}": scales.view(ml_dtypes.float8_e8m0fnu)}
    expect(opened(tmp_path, parts, quant_method="fp8"), expected)


@pytest.mark.torch
def test_mxfp4_equals_transformers(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = RNG.integers(0, 256, size=(2, 24, 2, 16)).astype(np.uint8)
    scales = RNG.integers(120, 134, size=(2, 24, 2)).astype(np.uint8)
    store = opened(tmp_path, {"w_blocks": blocks, "w_scales": scales})
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    np.testing.assert_array_equal(store.read("w").astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_nvfp4_in_both_layouts(layout, tmp_path):
    packed = RNG.integers(0, 256, size=(40, 24)).astype(np.uint8)
    scales, overall = np.abs(floats8(40, 3)), np.array([37.5], np.float32)
    per_block = (
        scales.astype(np.float32) / overall if layout == "compressed-tensors" else scales.astype(np.float32) * overall
    )
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(40, 48)
    expected = np.vectorize(e2m1)(codes).astype(np.float32) * np.repeat(per_block, 16, 1)
    names = {"compressed-tensors": (f"{W}_packed", f"{W}_global_scale"), "modelopt": (W, f"{W}_scale_2")}[layout]
    expect(opened(tmp_path, {names[0]: packed, f"{W}_scale": scales, names[1]: overall}, quant_method=layout), expected)


# Integers with zero points


def packed_int32(values: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Words of integers along an axis, by arithmetic on Python's integers."""
    values = np.moveaxis(values, axis, -1)
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    words = values.reshape(*values.shape[:-1], -1, per_word)
    total = sum(words[..., unit].astype(object) << (bits * place) for unit, place in enumerate(order))
    return np.moveaxis(np.array(total, np.uint64).astype(np.uint32).view(np.int32), -1, axis)


def in_three_words(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Words of 3-bit integers as AutoGPTQ lays them out: ten, one of which two bits are left, ten, one, ten."""
    assert bits == 3
    values = np.moveaxis(values, axis, -1)
    q = values.reshape(*values.shape[:-1], -1, 32).astype(np.uint64)
    first = sum(q[..., k] << np.uint64(3 * k) for k in range(10)) + ((q[..., 10] & np.uint64(3)) << np.uint64(30))
    second = (q[..., 10] >> np.uint64(2)) + sum(q[..., 11 + k] << np.uint64(3 * k + 1) for k in range(10))
    second += (q[..., 21] & np.uint64(1)) << np.uint64(31)
    third = (q[..., 21] >> np.uint64(1)) + sum(q[..., 22 + k] << np.uint64(3 * k + 2) for k in range(10))
    words = np.stack([first, second, third], axis=-1).reshape(*values.shape[:-1], -1)
    return np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sorted_inputs", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits, sorted_inputs, version, tmp_path):
    inputs, out, group = 64, 96, 16
    q = RNG.integers(0, 1 << bits, size=(inputs, out))
    zeros = RNG.integers(1, 1 << bits, size=(inputs // group, out))
    scales = RNG.random((inputs // group, out)).astype(np.float16)
    pack = in_three_words if bits == 3 else packed_int32
    groups = RNG.permutation(np.arange(inputs) // group) if sorted_inputs else np.arange(inputs) // group
    stored_zeros = zeros if version == "gptq_v2" else zeros - 1
    parts = {
        "qweight": pack(q, bits, 0), "qzeros": pack(stored_zeros, bits, 1), "scales": scales,
        "g_idx": groups.astype(np.int32), "bias": np.zeros(out, np.float16),
    }  # fmt: skip
    if not sorted_inputs:
        del parts["g_idx"]
    named = {f"{STEM}{part}": value for part, value in parts.items()}
    expected = (scales[groups].astype(np.float32) * (q - zeros[groups])).T
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version}
    expect(opened(tmp_path, named, **settings), expected)


def test_auto_round_is_read_in_the_layout_that_it_was_packed_in(tmp_path):
    parts = {
        "qweight": packed_int32(RNG.integers(0, 16, size=(64, 48)), 4, 0),
        "qzeros": packed_int32(np.full((4, 48), 7), 4, 1),
        "scales": RNG.random((4, 48)).astype(np.float16),
    }
    named = {f"{STEM}{part}": value for part, value in parts.items()}
    settings = {"bits": 4, "group_size": 16}
    expected = opened(tmp_path, named, quant_method="gptq", **settings).read(W)
    settings |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    np.testing.assert_array_equal(opened(tmp_path, named, **settings).read(W), expected)
    with pytest.raises(CheckpointError, match=r"'auto-round \(auto_round\)'"):
        opened(tmp_path, named, **settings | {"packing_format": "auto_round"})
    with pytest.raises(CheckpointError, match="scales has shape"):  # another layout
        opened(tmp_path, named, **settings | {"packing_format": "auto_round:auto_awq"})


def test_awq(tmp_path):
    inputs, out, group = 64, 48, 16
    q, zeros = RNG.integers(0, 16, size=(inputs, out)), RNG.integers(0, 16, size=(inputs // group, out))
    scales = RNG.random((inputs // group, out)).astype(np.float16)
    order = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each column in its word
    parts = {"qweight": packed_int32(q, 4, 1, order), "qzeros": packed_int32(zeros, 4, 1, order), "scales": scales}
    groups = np.arange(inputs) // group
    expected = (scales[groups].astype(np.float32) * (q - zeros[groups])).T
    named = {f"{STEM}{part}": value for part, value in parts.items()}
    expect(opened(tmp_path, named, quant_method="awq", bits=4, group_size=group, version="gemm"), expected)


@pytest.mark.parametrize("group", [16, 32, -1])
def test_awq_of_the_gemv_kernel(group, tmp_path):
    inputs, out = 64, 48
    size = inputs if group == -1 else group
    count, padded = inputs // size, 16  # zero points and scales are padded, here to two words of eight
    q, zeros = RNG.integers(0, 16, size=(out, inputs)), np.zeros((out, padded), np.int64)
    scales = np.zeros((out, padded), np.float16)
    zeros[:, :count], scales[:, :count] = RNG.integers(0, 16, size=(out, count)), RNG.random((out, count))
    parts = {"qweight": packed_int32(q, 4, 1), "qzeros": packed_int32(zeros, 4, 1), "scales": scales}
    groups = np.arange(inputs) // size
    expected = scales[:, groups].astype(np.float32) * (q - zeros[:, groups])
    named = {f"{STEM}{part}": value for part, value in parts.items()}
    expect(opened(tmp_path, named, quant_method="awq", bits=4, group_size=group, version="gemv"), expected)
    with pytest.raises(CheckpointError, match="group_size None does not divide the 64 inputs"):
        opened(tmp_path, named, quant_method="awq", bits=4, version="gemv")


def in_a_stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Words of which each row is one number, whose lowest bits are the first integer."""
    rows = [sum(int(value) << bits * i for i, value in enumerate(row)) for row in values]
    return np.array(
        [[row >> 32 * i & 0xFFFFFFFF for i in range(values.shape[1] * bits // 32)] for row in rows], np.uint32
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_packed(bits, groups, symmetric, tmp_path):
    rows, columns, half = 64 if 32 % bits else 40, 64, 1 << (bits - 1)
    q = RNG.integers(-half, half, size=(rows, columns))
    zeros = RNG.integers(-half, half, size=(rows, groups)) * (not symmetric)
    scales = RNG.random((rows, groups)).astype(ml_dtypes.bfloat16)
    parts = {
        f"{W}_packed": in_a_stream(q + half, bits).view(np.int32), f"{W}_scale": scales,
        f"{W}_shape": np.array([rows, columns], np.int64),
    }  # fmt: skip
    if not symmetric:
        padded = np.pad(zeros + half, ((0, -rows % 32), (0, 0)))[: -(-rows * bits // 32) * 32 // bits]
        parts[f"{W}_zero_point"] = np.ascontiguousarray(in_a_stream(padded.T, bits).view(np.int32).T)
    wide = (np.repeat(a, columns // groups, 1) for a in (scales.astype(np.float32), zeros))
    scale, zero = wide
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": bits}}}}
    expect(opened(tmp_path, parts, **settings), scale * (q - zero).astype(np.float32))
    settings["config_groups"]["group_0"]["weights"]["num_bits"] = 7  # which old versions packed four to a word
    with pytest.raises(CheckpointError, match="integers of 7 bits"):
        opened(tmp_path, parts, **settings)


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_packed_with_sorted_inputs(symmetric, tmp_path):
    q, groups = RNG.integers(-8, 8, size=(40, 64)), RNG.permutation(np.arange(64) // 16)
    zeros, scales = RNG.integers(-8, 8, size=(40, 4)) * (not symmetric), RNG.random((40, 4)).astype(np.float32)
    parts = {
        f"{W}_packed": packed_int32(q + 8, 4, 1), f"{W}_scale": scales, f"{W}_g_idx": groups.astype(np.int32),
        f"{W}_shape": np.array([40, 64], np.int64),
    }  # fmt: skip
    parts |= {} if symmetric else {f"{W}_zero_point": packed_int32(zeros + 8, 4, 0)}
    expected = scales[:, groups] * (q - zeros[:, groups]).astype(np.float32)
    expect(opened(tmp_path, parts, quant_method="compressed-tensors"), expected)
    unset = parts | {f"{W}_g_idx": np.full(64, -1, np.int32)}
    in_order = np.repeat(scales, 16, 1) * (q - np.repeat(zeros, 16, 1)).astype(np.float32)
    expect(opened(tmp_path, unset, quant_method="compressed-tensors"), in_order)
    broken = parts | {f"{W}_g_idx": np.arange(64, dtype=np.int32)}
    with pytest.raises(CheckpointError, match="holds groups 0 to 63, expected 0 to 3"):
        opened(tmp_path, broken, quant_method="compressed-tensors").read(W)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("biases", ["biases", "qbiases"])
def test_mlx(bits, biases, tmp_path):
    q = RNG.integers(0, 1 << bits, size=(40, 64))
    scales, offsets = (RNG.normal(size=(40, 2)).astype(ml_dtypes.bfloat16) for _ in range(2))
    parts = {W: in_a_stream(q, bits), f"{STEM}scales": scales, f"{STEM}{biases}": offsets}
    scale, offset = (np.repeat(a.astype(np.float32), 32, 1) for a in (scales, offsets))
    expected = scale * q.astype(np.float32) + offset
    expect(opened(tmp_path, parts, group_size=32, bits=bits), expected)
    own = {"group_size": 64, "bits": 4, STEM.removeprefix("model.").removesuffix("."): {"group_size": 32, "bits": bits}}
    store, _ = dequantised(SafetensorsFile(tmp_path / "model.safetensors"), {"quantization": own})
    np.testing.assert_array_equal(store.read(W), expected)
    with pytest.raises(CheckpointError, match="says bits None and group_size None of it"):
        opened(tmp_path, parts)


@pytest.mark.torch
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_equals_mlx(bits, tmp_path):
    mx = pytest.importorskip("mlx.core")
    packed, scales, biases = mx.quantize(mx.random.normal((64, 128)), group_size=64, bits=bits)
    theirs = np.array(mx.dequantize(packed, scales, biases, group_size=64, bits=bits))
    parts = {W: np.array(packed), f"{STEM}scales": np.array(scales), f"{STEM}biases": np.array(biases)}
    np.testing.assert_allclose(opened(tmp_path, parts, group_size=64, bits=bits).read(W), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [np.int8, FP8])
def test_quanto(kind, tmp_path):
    data = RNG.integers(-127, 128, size=(40, 24)).astype(np.int8) if kind == np.int8 else floats8(40, 24)
    scales = RNG.random((40, 1)).astype(np.float32)
    parts = {f"{W}._data": data, f"{W}._scale": scales}
    expect(opened(tmp_path, parts, quant_method="quanto"), data.astype(np.float32) * scales)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["qint8", "qfloat8"])
def test_quanto_equals_quanto(kind, tmp_path):
    torch, quanto = pytest.importorskip("torch"), pytest.importorskip("optimum.quanto")
    model = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False))
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    state = {f"model.layers.{name}": value for name, value in model.state_dict().items() if "weight" in name}
    assert len(state) == 2
    found = opened(tmp_path, {name: _numpy(value) for name, value in state.items()}, quant_method="quanto").read(
        "model.layers.0.weight"
    )
    np.testing.assert_array_equal(found, model[0].weight.dequantize().detach().numpy())


_SCHEMES = {
    "pack-quantized 4 bits": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16},
    "pack-quantized 3 bits": {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    "pack-quantized 8 bits": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "int-quantized": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    "mxfp8-quantized": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
}


@pytest.mark.torch
@pytest.mark.parametrize("name", _SCHEMES)
def test_formats_of_compressed_tensors_equal_its_own(name, tmp_path):
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind, settings = name.split()[0], _SCHEMES[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    rows, columns = 64, 96
    blocks = settings.get("block_structure", [1, settings.get("group_size", columns)])
    torch.manual_seed(0)
    scales = 2.0 ** torch.randint(-4, 3, (rows // blocks[0], columns // blocks[1])).float()
    state = {"weight": 3 * torch.randn(rows, columns), "weight_scale": scales}
    if not settings.get("symmetric", True):
        half = 1 << min(settings["num_bits"], 4) - 1
        state["weight_zero_point"] = torch.randint(-half, half, scales.shape, dtype=torch.int8)
    if kind.startswith("nvfp4"):
        state["weight_global_scale"] = torch.tensor([64.0])  # it computes in bfloat16
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    theirs = compressor.decompress(stored, scheme)["weight"].float().numpy()
    found = opened(tmp_path, {STEM + part: _numpy(a) for part, a in stored.items()}, quant_method="compressed-tensors")
    assert found.names() == (W,)
    assert np.corrcoef(theirs.ravel(), state["weight"].numpy().ravel())[0, 1] > 0.5
    np.testing.assert_allclose(found.read(W).astype(np.float32), theirs, rtol=1e-6)


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    bits = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: FP8}.get(tensor.dtype)
    return tensor.numpy() if bits is None else tensor.view(torch.uint8).numpy().view(bits)


# bitsandbytes


def four_bit(shape: tuple[int, int], nested: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a weight as bitsandbytes stores them, and what it stands for."""
    count, block = int(np.prod(shape)), 64
    codes, table = RNG.integers(0, 16, size=count), np.sort(RNG.normal(size=16)).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "shape": list(shape), "dtype": "bfloat16"}
    blocks = -(-count // block)
    if nested:
        inner, outer = RNG.integers(0, 256, size=blocks), RNG.random(-(-blocks // 256)).astype(np.float32)
        inner_table, offset = np.sort(RNG.normal(size=256)).astype(np.float32), 0.125
        magnitudes = inner_table[inner] * np.repeat(outer, 256)[:blocks] + np.float32(offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts = {"absmax": inner.astype(np.uint8), "nested_absmax": outer, "nested_quant_map": inner_table}
    else:
        magnitudes = RNG.random(blocks).astype(np.float32)
        parts = {"absmax": magnitudes}
    packed = (codes.reshape(-1, 2) @ np.array([16, 1])).astype(np.uint8)[:, None]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    named = {f"{W}.{part}": value for part, value in parts.items()}
    named |= {W: packed, f"{W}.quant_map": table, f"{W}.quant_state.bitsandbytes__nf4": text}
    expected = (table[codes] * np.repeat(magnitudes, block)[:count]).reshape(shape)
    return named, expected


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (300, 70)])
def test_bitsandbytes_four_bit(nested, shape, tmp_path):
    tensors, expected = four_bit(shape, nested)
    expect(opened(tmp_path, tensors, load_in_4bit=True), expected)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_equals_bitsandbytes(kind, nested, tmp_path):
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 192)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    parts = {f"{W}.{name}": value.numpy() for name, value in state.as_dict(packed=True).items()}
    theirs = bnb.functional.dequantize_4bit(packed, state).numpy()
    store = opened(tmp_path, {W: packed.numpy(), **parts}, load_in_4bit=True)
    np.testing.assert_allclose(store.read(W), theirs, rtol=1e-6, atol=1e-7)


# What is refused, and what is left over


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({f"{STEM}qweight": (8, 8)}, {"quant_method": "marlin"}, "qweight by the method 'marlin'"),
        ({f"{STEM}qweight": (8, 8)}, {}, "qweight by the method ''"),
        ({f"{STEM}qweight": (8, 8)}, {"quant_method": "gptq", "bits": 5}, "GPTQ with 5 bits"),
        ({f"{STEM}qweight": (8, 8)}, {"quant_method": "gptq", "bits": 4}, r"missing .*qzeros, .*scales"),
        ({f"{STEM}qweight": (8, 8)}, {"quant_method": "awq", "version": "gemv_fast"}, "AWQ of version gemv_fast"),
        (
            {f"{STEM}codes": (8, 8), f"{STEM}codebooks": (2, 2)},
            {"quant_method": "aqlm"},
            r"the method is aqlm; read are FP8",
        ),
        ({f"{STEM}W_q": (8, 8)}, {"quant_method": "hqq"}, "the method is hqq"),
        ({W: (8, 8)}, {"quant_method": "eetq"}, r"1 tensor is of weights .* \(int32\); the method is eetq;"),
        ({W: (8, 8)}, {}, r"1 tensor is of weights .* unknown, for config.json does not say, or the file is damaged"),
        ({f"{STEM}q_weight": (8, 8), f"{STEM}q_perm": (8,)}, {}, "method is EXL2, by their names"),
        ({f"{STEM}q_weight": (8, 8), f"{STEM}q_perm": (8,)}, {"quant_method": "exl2"}, "method is exl2;"),
        ({f"{STEM}B": (8, 8)}, {"quant_method": "gptq", "checkpoint_format": "marlin"}, r"method is gptq \(marlin\)"),
        ({f"{W}.bitmask": (8, 8)}, {"quant_method": "compressed-tensors", "format": "sparse-24-bitmask"}, "sparse-24"),
        ({f"{STEM}indices": (1, 8, 8)}, {"quant_method": "vptq"}, "method is vptq"),
        ({f"{STEM}weight_qdata": (8, 8)}, {}, "torchao"),
        ({f"{W}._data": (8, 8), f"{W}._shift": (8, 8)}, {}, "method is quanto, by their names"),
        ({f"{STEM}matrix": (8, 8)}, {}, r"such as .*matrix \(int32\)"),
    ],
)
def test_other_formats_are_refused_by_their_names(tensors, settings, message, tmp_path):
    stored = {name: np.zeros(shape, np.int32) for name, shape in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, stored, **settings)


def test_integers_that_are_no_weights_are_no_hindrance(tmp_path):
    tables = {
        "transformer.h.0.attn.bias": np.zeros((1, 1, 8, 8), np.uint8), "model.position_ids": np.zeros((4, 8), np.int32),
        "model.layers.0.mlp.gate.tid2eid": np.zeros((64, 6), np.int32), "model.order": np.zeros((4, 4), np.int64),
        "model.num_batches_tracked": np.zeros((), np.int32),
    }  # fmt: skip
    stored = SafetensorsFile(save(tmp_path / "model.safetensors", tables))
    assert dequantised(stored, {}) == (stored, [])


def test_settings_of_a_text_config_and_of_mlx_count(tmp_path):
    stored = SafetensorsFile(save(tmp_path / "model.safetensors", {W: np.zeros((8, 8), np.uint32)}))
    for settings, message in (
        ({"text_config": {"quantization_config": {"quant_method": "eetq"}}}, "the method is eetq"),
        ({"thinker_config": {"text_config": {"quantization_config": {"quant_method": "eetq"}}}}, "the method is eetq"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "mxfp4"}}, r"the method is MLX \(mxfp4\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dequantised(stored, settings)


@pytest.mark.parametrize(
    "changed",
    [
        {f"{W}.absmax": np.zeros(3, np.float32)},
        {f"{W}.quant_state.bitsandbytes__nf4": np.frombuffer(b"{}", np.uint8)},
        {f"{W}.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [9e99], "blocksize": 0}', np.uint8)},
        {W: np.zeros((3, 1), np.uint8)},
    ],
)
def test_parts_that_do_not_fit_are_refused(changed, tmp_path):
    tensors, _ = four_bit((40, 24), nested=False)
    with pytest.raises(CheckpointError, match=r"no state of bitsandbytes|expected \d+ values"):
        opened(tmp_path, tensors | changed)


def test_a_scale_that_fits_no_blocks_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="are no scales of blocks of"):
        opened(tmp_path, {W: floats8(40, 24), f"{W}_scale_inv": np.ones((7, 5), np.float32)})


@pytest.mark.parametrize(
    ("beside", "dtype", "message"),
    [
        (f"{STEM}weight_scale", np.int32, r"weight_scale is int32: scales are floats, or bytes"),
        (
            f"{STEM}scale_of_weight",
            np.float32,
            r"is float8_e4m3fn, and beside it is .*scale_of_weight, which is no known",
        ),
        (f"{W}.amax", np.float32, r"beside it is .*weight.amax"),
    ],
)
def test_fp8_whose_scales_are_not_understood_is_refused(beside, dtype, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, {W: floats8(40, 24), beside: np.ones((40, 1), dtype)})


@pytest.mark.parametrize("lost", [W, W.removesuffix(".weight")], ids=["matrix", "experts"])
def test_fp8_that_lost_its_scales_is_refused(lost, tmp_path):
    other = lost.replace("up_proj", "down_proj")
    with pytest.raises(CheckpointError, match=f"{lost}: FP8 without scales, which 1 other has"):
        opened(tmp_path, {lost: floats8(40, 24), other: floats8(40, 24), f"{other}_scale": np.ones((), np.float32)})


def test_settings_left_over_on_floats_are_a_note(tmp_path):
    stored = SafetensorsFile(save(tmp_path / "model.safetensors", {W: np.ones((4, 4), np.float16)}))
    store, notes = dequantised(stored, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert store is stored
    assert notes == ["config.json has a quantization_config (gptq), but no weight is quantised"]
    assert dequantised(stored, {}) == (stored, [])


def test_weights_that_are_quantised_as_the_model_runs_are_refused(tmp_path):
    stored = SafetensorsFile(save(tmp_path / "model.safetensors", {W: np.ones((4, 4), np.float16)}))
    with pytest.raises(CheckpointError, match="quantises these weights and its activations as it runs"):
        dequantised(stored, {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}})


def test_a_quantised_model_is_opened_as_any_other(tmp_path):
    case = CASES["qwen3-gqa-untied-default"]
    tensors = {}
    for name, shape in tensor_shapes(leaf_layouts(case.arch()).values()).items():
        weight = case.weight(name, shape).astype(np.float32)
        if "_proj" in name:
            tensors |= {name: weight.astype(FP8), f"{name}_scale": np.array(2.0, np.float32)}
        else:
            tensors[name] = weight
    settings = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(case.config | settings))
    save(tmp_path / "model.safetensors", tensors)
    found = open_checkpoint(str(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = tensors[name].astype(np.float32) * 2
    np.testing.assert_array_equal(found.layer(1)["mlp"]["up_proj"]["kernel"], expected.T)
    assert any("dequantised as they are read: FP8" in note for note in found.notes)


def test_a_method_is_named_first_where_tensors_do_not_fit(tmp_path):
    """As those of a format whose parts are all floats would not."""
    case = CASES["qwen3-gqa-untied-default"]
    shapes = tensor_shapes(leaf_layouts(case.arch()).values())
    tensors = {
        name.replace("up_proj.weight", "up_proj.factor"): np.ones(shape, np.float32) for name, shape in shapes.items()
    }
    (tmp_path / "config.json").write_text(json.dumps(case.config | {"quantization_config": {"quant_method": "new"}}))
    save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(str(tmp_path))
    assert "quantization_config (new), but no weight is quantised" in raised.value.problems[0]
    assert "missing tensor model.layers" in raised.value.problems[1]
