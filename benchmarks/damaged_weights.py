"""What the weights of a damaged checkpoint are, read without this package: what `benchmarks.fuzz` compares with.

Small checkpoints whole in memory; a file that cannot be read so has no weights here. Of an adapter, and of a quantised
checkpoint, the result is what its formats say, computed from the stored tensors by their names.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8, "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


def weights_in(folder: Path) -> Tensors:
    """Returns the weights in the files of a folder by the names of transformers; empty if they cannot be read."""
    try:
        return _weights_in(folder)
    except Exception:  # of whatever the reader of a damaged file raises
        return {}


def _weights_in(folder: Path) -> Tensors:
    if (folder / "adapter_config.json").exists():
        config = json.loads((folder / "adapter_config.json").read_text())
        return _adapted(_weights_in(Path(config["base_model_name_or_path"])), _stored(folder), config)
    if (folder / "model.gguf").exists():
        return _of_gguf(folder / "model.gguf")
    if (folder / "pytorch_model.bin").exists():
        return _of_bin(folder / "pytorch_model.bin")
    return _dequantised(_stored(folder))


def _stored(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] in _DTYPES:
                raw = np.frombuffer(body[slice(*entry["data_offsets"])], _DTYPES[entry["dtype"]])
                found[name] = raw.reshape(entry["shape"])
    return found


def _dequantised(stored: Tensors) -> Tensors:
    """Returns weights as floats; those of 8 bits that lost their scales as no numbers, which nothing equals."""
    found = {}
    for name, values in stored.items():
        stem = name.removesuffix("weight")
        known = (f"{name}_scale", f"{name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight")
        scales = next((stored[one] for one in known if one in stored), None)
        if scales is not None and values.ndim == scales.ndim == 2:
            factors = (
                scales.astype(np.float64) if scales.dtype != np.uint8 else 2.0 ** (scales.astype(np.float64) - 127)
            )
            found[name] = values.astype(np.float64) * np.repeat(factors, values.shape[1] // scales.shape[1], 1)
        elif name.endswith("weight"):
            found[name] = values.astype(np.float64) if values.itemsize > 1 else np.full(values.shape, np.nan)
    return found


def _adapted(base: Tensors, stored: Tensors, config: Mapping[str, Any]) -> Tensors:
    found = dict(base)
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    for name, a in stored.items():
        if name.endswith(".lora_A.weight"):
            b = stored[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            found[target] = base[target] + scaling * b.astype(np.float64) @ a.astype(np.float64)
    return found


def _of_gguf(path: Path) -> Tensors:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    ours = {table.get_name(name, try_suffixes=(".weight",)): name for name in _llama_names()}
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = ours[tensor.name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp has the two halves of a head by turns
            heads = 4 if "q_proj" in name else 2
            values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        found[name] = values
    return found


def _llama_names() -> list[str]:
    inside = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    inside += ["input_layernorm", "post_attention_layernorm"]
    layers = [f"model.layers.{i}.{module}.weight" for i in range(2) for module in inside]
    return ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", *layers]


class _Unpickler(pickle.Unpickler):
    """Of the pickle that `mutations` writes: what it names beside tensors is nothing."""

    def __init__(self, data: bytes):
        self.data, self.archive = data, zipfile.ZipFile(io.BytesIO(data))
        super().__init__(io.BytesIO(self._record("archive/data.pkl")))

    def _record(self, name: str) -> bytes:
        """Returns a record, whatever its checksum: neither PyTorch's mapping of a file nor this package looks at it."""
        info = self.archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return self.archive.read(name)
        at = info.header_offset
        lengths = (int.from_bytes(self.data[at + i : at + i + 2], "little") for i in (26, 28))
        start = at + 30 + sum(lengths)
        return self.data[start : start + info.file_size]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        return {"FloatStorage": np.float32, "HalfStorage": np.float16, "OrderedDict": dict}[name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        return np.frombuffer(self._record(f"archive/data/{pid[2]}"), pid[1])


def _rebuilt(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if not 0 <= offset <= last < storage.size or min(strides, default=0) < 0:
        raise ValueError("outside of its storage")
    size = storage.itemsize
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, [size * stride for stride in strides])


def _of_bin(path: Path) -> Tensors:
    return dict(_Unpickler(path.read_bytes()).load())
