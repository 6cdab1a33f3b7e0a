"""Small checkpoints, and damage to them: what `benchmarks.fuzz` reads.

A mutation changes the files of a copy of a checkpoint, drawn from a generator. Each is named for what it damages.
"""

import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

Mutation = Callable[[np.random.Generator, Path], None]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 128, "torch_dtype": "float32",
    "transformers_version": "4.44.0",
}  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 10**9, 10**40, 1e308, float("nan"), "", "x" * 10_000, [], [[]], {},
    {"a": {}}, [1] * 1000, "silu",
)  # fmt: skip


LAYOUTS = ("whole", "sharded", "bin", "adapter", "gguf", "quantised")


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Writes one model in each layout, by `LAYOUTS`, and returns layout -> folder."""
    folders = {name: folder / name for name in LAYOUTS}
    tensors = _tensors()
    for name, path in folders.items():
        path.mkdir(parents=True)
        if name not in ("adapter", "gguf"):
            (path / "config.json").write_text(json.dumps(CONFIG))
            _write_tokenizer(path)
    save_file(tensors, folders["whole"] / "model.safetensors")
    _write_sharded(folders["sharded"], tensors)
    _write_bin(folders["bin"] / "pytorch_model.bin", tensors)
    _write_adapter(folders["adapter"], folders["whole"])
    _write_gguf(folders["gguf"] / "model.gguf", tensors)
    _write(folders["quantised"] / "model.safetensors", _quantised(tensors))
    settings = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folders["quantised"] / "config.json").write_text(json.dumps(CONFIG | settings))
    return folders


def _tensors() -> dict[str, np.ndarray]:
    rng, D, F, V = np.random.default_rng(0), 32, 48, 64
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (D if p in "qo" else D // 2, D) for p in "qkvo"}
        shapes |= {f"{at}mlp.gate_proj.weight": (F, D), f"{at}mlp.up_proj.weight": (F, D)}
        shapes |= {f"{at}mlp.down_proj.weight": (D, F), f"{at}input_layernorm.weight": (D,)}
        shapes |= {f"{at}post_attention_layernorm.weight": (D,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _quantised(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns MLPs as int8 with a scale for each row, attention as FP8 with an exponent for each 8 values."""
    found: dict[str, np.ndarray] = {}
    for name, weight in tensors.items():
        if ".mlp." in name:
            scales = np.abs(weight).max(axis=1, keepdims=True) / 127
            found |= {name: np.round(weight / scales).astype(np.int8), f"{name}_scale": scales}
        elif ".self_attn." in name:
            blocks = weight.reshape(len(weight), -1, 8)
            exponents = np.ceil(np.log2(np.abs(blocks).max(axis=2, keepdims=True) / 448))
            scaled = (blocks / 2.0**exponents).astype(ml_dtypes.float8_e4m3fn)
            found |= {name: scaled.reshape(weight.shape), f"{name}_scale": (exponents[..., 0] + 127).astype(np.uint8)}
        else:
            found[name] = weight
    return found


_KINDS = {"float32": "F32", "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3"}


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file; the package's own writer knows no floats of eight bits of numpy."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": _KINDS[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _write_tokenizer(folder: Path) -> None:
    vocab = {chr(33 + i): i for i in range(64)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _write_sharded(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_bin(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes what torch.save writes, without torch."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(tensors))
        for i, tensor in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", tensor.tobytes())


def _pickled(tensors: Mapping[str, np.ndarray]) -> bytes:
    program = b"\x80\x02}("
    for i, (name, tensor) in enumerate(tensors.items()):
        strides = [stride // tensor.itemsize for stride in tensor.strides]
        storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(i)) + _text("cpu")
        program += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _int(tensor.size) + b"tQ" + _int(0)
        program += b"(" + b"".join(map(_int, tensor.shape)) + b"t(" + b"".join(map(_int, strides)) + b"t\x89"
        program += b"ccollections\nOrderedDict\n)RtR"
    return program + b"u."


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _write_gguf(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + i) for i in range(63)), "!#"])
    writer.add_token_merges(["! #"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.shape[-1] == 32 and tensor.ndim == 2 else None
        data = tensor if kind is None else gguf.quants.quantize(tensor, kind)
        writer.add_tensor(str(table.get_name(name, try_suffixes=(".weight",))), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_adapter(folder: Path, base: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    at, rng = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(1)
    factors = {f"{at}.lora_A.weight": rng.normal(size=(2, 32)), f"{at}.lora_B.weight": rng.normal(size=(32, 2))}
    save_file({name: a.astype(np.float32) for name, a in factors.items()}, folder / "adapter_model.safetensors")


# Mutations. Those of safetensors act on one file of the folder, whatever its name.


def _safetensors(rng: np.random.Generator, folder: Path) -> Path:
    return Path(rng.choice(sorted(map(str, folder.glob("*.safetensors")))))


def _with_header(rng: np.random.Generator, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = _safetensors(rng, folder)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _with_tensor(rng: np.random.Generator, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    def of_one(header: dict[str, Any]) -> None:
        change(header[str(rng.choice(sorted(header)))])

    _with_header(rng, folder, of_one)


def _flip(rng: np.random.Generator, path: Path, first: int = 0, last: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    for place in rng.integers(first, max(first + 1, len(data) if last is None else last), size=rng.integers(1, 6)):
        if place < len(data):
            data[place] = rng.integers(256)
    path.write_bytes(data)


def _truncate(rng: np.random.Generator, path: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def _header_bytes(rng: np.random.Generator, folder: Path) -> None:
    path = _safetensors(rng, folder)
    _flip(rng, path, 0, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


def _dtype(rng: np.random.Generator, folder: Path) -> None:
    kinds = ["F64", "F16", "BF16", "I8", "U8", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "C64", "X" * 5000, "I32", 7, None]
    _with_tensor(rng, folder, lambda tensor: tensor.update(dtype=kinds[rng.integers(len(kinds))]))


def _dtype_and_shape(rng: np.random.Generator, folder: Path) -> None:
    """Gives a tensor another dtype that the number of its bytes allows."""

    def change(tensor: dict[str, Any]) -> None:
        kind, factor = [("F64", 0.5), ("BF16", 2), ("I8", 4), ("F8_E4M3", 4), ("I32", 1)][rng.integers(5)]
        tensor |= {"dtype": kind, "shape": [*tensor["shape"][:-1], int(tensor["shape"][-1] * factor)]}

    _with_tensor(rng, folder, change)


def _offsets(rng: np.random.Generator, folder: Path) -> None:
    def change(tensor: dict[str, Any]) -> None:
        shift = int(rng.choice([-4096, -4, 4, 128, 2**40, 2**63]))
        tensor["data_offsets"] = [offset + shift * int(rng.integers(2)) for offset in tensor["data_offsets"]]

    _with_tensor(rng, folder, change)


def _shape(rng: np.random.Generator, folder: Path) -> None:
    shapes: list[Any] = [[2**31, 2**31], [0], [], [-1, 32], [2**62, 4], [1] * 100, [1.5], "x", [32, 32, 1], [[1]], None]
    _with_tensor(rng, folder, lambda tensor: tensor.update(shape=shapes[rng.integers(len(shapes))]))


def _names(rng: np.random.Generator, folder: Path) -> None:
    renames: list[Callable[[str], str]] = [
        lambda name: f"module.{name}", lambda name: f"some.wrapper.{name}", lambda name: f"language_model.{name}",
        lambda name: name[::-1], lambda name: "x" * 20_000 + name, lambda name: name.replace("layers", "h"),
        lambda name: name.replace("0", str(10**30)), lambda name: f"_orig_mod.{name}\n\0",
    ]  # fmt: skip
    rename = renames[rng.integers(len(renames))]
    _with_header(rng, folder, lambda header: {rename(name): tensor for name, tensor in header.items()})


def _extra(rng: np.random.Generator, folder: Path) -> None:
    names = ["x" * 100_000, "score.weight", "", "model.layers.7.mlp.up_proj.weight", "model.norm.weight.qweight", "é\n"]
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    _with_header(rng, folder, lambda header: {**header, names[rng.integers(len(names))]: empty})


def _million(rng: np.random.Generator, folder: Path) -> None:
    """Adds so many empty tensors that the header is nearly as long as it may be."""
    path, count = folder / "model.safetensors", int(rng.choice([10**5, 10**6]))
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"model.layers.{i}.x":{entry}' for i in range(count)) + "}").encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def _not_finite(rng: np.random.Generator, folder: Path) -> None:
    path = _safetensors(rng, folder)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + 4 * int(rng.integers((len(data) - start) // 4))
    data[at : at + 4] = struct.pack("<f", rng.choice([np.nan, np.inf, -np.inf]))
    path.write_bytes(data)


def _same_size(rng: np.random.Generator, folder: Path) -> None:
    """Gives a tensor another dtype of as many bytes."""
    kinds = {"F32": ["I32", "U32"], "I8": ["U8", "F8_E4M3", "BOOL"], "U8": ["I8", "F8_E8M0", "F8_E5M2"]}

    def change(tensor: dict[str, Any]) -> None:
        others = kinds.get(tensor["dtype"], ["I8", "U8", "F8_E5M2", "F8_E4M3FNUZ"])
        tensor["dtype"] = others[rng.integers(len(others))]

    _with_tensor(rng, folder, change)


def _scale_names(rng: np.random.Generator, folder: Path) -> None:
    """Renames the scales of one weight, or of all."""
    ends = ["_scale_inv", "_scale_2", "_amax", "_zero_point", "._scale", "_factor", "_SCALE"]
    end, part = ends[rng.integers(len(ends))], str(rng.choice(["", "mlp", "layers.0.self_attn.q_proj"]))
    _with_header(
        rng,
        folder,
        lambda header: {
            name.removesuffix("_scale") + end if name.endswith("_scale") and part in name else name: tensor
            for name, tensor in header.items()
        },
    )


def _without_tensor(rng: np.random.Generator, folder: Path) -> None:
    """Leaves out a tensor and its bytes; scales mostly."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body, kept = json.loads(data[8 : 8 + size]), data[8 + size :], b""
    gone = str(rng.choice([name for name in sorted(header) if name.endswith("_scale") or not rng.integers(8)]))
    for entry in (header[name] for name in header if name != gone):
        own = body[slice(*entry["data_offsets"])]
        entry["data_offsets"] = [len(kept), len(kept) + len(own)]
        kept += own
    del header[gone]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + kept)


def _config_value(rng: np.random.Generator, folder: Path) -> None:
    name = str(rng.choice([*CONFIG, "head_dim", "layer_types", "rope_parameters", "quantization_config", "is_causal"]))
    value = _VALUES[rng.integers(len(_VALUES))]
    (folder / "config.json").write_text(json.dumps(CONFIG | {name: value}))


def _config_dropped(rng: np.random.Generator, folder: Path) -> None:
    dropped = set(rng.choice(sorted(CONFIG), size=rng.integers(1, 4)))
    (folder / "config.json").write_text(json.dumps({n: value for n, value in CONFIG.items() if n not in dropped}))


def _config_size(rng: np.random.Generator, folder: Path) -> None:
    sizes = [name for name, value in CONFIG.items() if type(value) is int]
    value = int(rng.choice([0, 1, 3, 7, 1000, 9999, 10**6, 2**24, 2**31 - 1, 2**31, 10**9]))
    (folder / "config.json").write_text(json.dumps(CONFIG | {str(rng.choice(sizes)): value}))


def _config_text(rng: np.random.Generator, folder: Path) -> None:
    if rng.integers(3):
        _flip(rng, folder / "config.json")
        return
    texts = [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"a":' * 50_000,
        "\ufeff{}",
        '{"model_type": []}',
        "{" + '"a":1,' * 10**6,
    ]
    (folder / "config.json").write_text(texts[rng.integers(len(texts))])


def _index(rng: np.random.Generator, folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    files = ["../whole/model.safetensors", "/etc/passwd", "config.json", "", 7, None, ["a"], "a" * 10_000 + ".bin",
             "nowhere.safetensors", "\0.safetensors", "model-00001-of-00002.safetensors"]  # fmt: skip
    name = str(rng.choice([*index["weight_map"], "ghost", "lm_head.weight"]))
    index["weight_map"][name] = files[rng.integers(len(files))]
    file.write_text(json.dumps(index))


def _index_text(rng: np.random.Generator, folder: Path) -> None:
    _flip(rng, folder / "model.safetensors.index.json")


def _shard_gone(rng: np.random.Generator, folder: Path) -> None:
    _safetensors(rng, folder).unlink()


def _bin_pickle(rng: np.random.Generator, folder: Path) -> None:
    """Flips bytes of the pickle inside the archive, whose checksums are made anew."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    pickled = bytearray(content["archive/data.pkl"])
    for place in rng.integers(len(pickled), size=rng.integers(1, 5)):
        pickled[place] = rng.integers(256)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**content, "archive/data.pkl": bytes(pickled)}.items():
            archive.writestr(name, data)


def _bin_bomb(rng: np.random.Generator, folder: Path) -> None:
    """Compresses a pickle, or a record, of up to 4 GiB of zeros into a few megabytes."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    victim = str(rng.choice(["archive/data.pkl", "archive/data/0", "archive/data/99"]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in content.items():
            if name != victim:
                archive.writestr(name, data)
        with archive.open(victim, "w", force_zip64=True) as file:
            for _ in range(int(rng.choice([64, 1024]))):
                file.write(bytes(1 << 20))


def _adapter_value(rng: np.random.Generator, folder: Path) -> None:
    file = folder / "adapter_config.json"
    names = ["r", "lora_alpha", "peft_type", "bias", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
             "revision", "base_model_name_or_path", "init_lora_weights", "target_modules"]  # fmt: skip
    value = _VALUES[rng.integers(len(_VALUES))]
    file.write_text(json.dumps(json.loads(file.read_text()) | {str(rng.choice(names)): value}))


def _adapter_cycle(rng: np.random.Generator, folder: Path) -> None:
    file = folder / "adapter_config.json"
    target = folder if rng.integers(2) else folder.parent / f"{folder.name}-other"
    if target != folder:
        _write_adapter_of(target, folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(target)}))


def _write_adapter_of(folder: Path, base: Path) -> None:
    folder.mkdir(exist_ok=True)
    _write_adapter(folder, base)


def _on(path: str, change: Callable[[np.random.Generator, Path], None]) -> Mutation:
    return lambda rng, folder: change(rng, folder / path)


MUTATIONS: dict[str, tuple[str, Mutation, float]] = {
    "header bytes": ("whole", _header_bytes, 1),
    "header of a shard": ("sharded", _header_bytes, 1),
    "truncated": ("whole", _on("model.safetensors", _truncate), 1),
    "bytes": ("whole", _on("model.safetensors", _flip), 1),
    "dtype": ("whole", _dtype, 1),
    "dtype and shape": ("whole", _dtype_and_shape, 1),
    "offsets": ("whole", _offsets, 1),
    "shape": ("whole", _shape, 1),
    "names": ("whole", _names, 1),
    "extra tensor": ("whole", _extra, 1),
    "a million tensors": ("whole", _million, 0.05),
    "NaN and infinity": ("whole", _not_finite, 1),
    "config: a value": ("whole", _config_value, 3),
    "config: a size": ("whole", _config_size, 2),
    "config: dropped": ("whole", _config_dropped, 1),
    "config: text": ("whole", _config_text, 1),
    "index: a file": ("sharded", _index, 1),
    "index: text": ("sharded", _index_text, 1),
    "index: a shard is gone": ("sharded", _shard_gone, 0.2),
    "bin: bytes": ("bin", _on("pytorch_model.bin", _flip), 1),
    "bin: truncated": ("bin", _on("pytorch_model.bin", _truncate), 1),
    "bin: pickle": ("bin", _bin_pickle, 2),
    "bin: zip bomb": ("bin", _bin_bomb, 0.1),
    "adapter: a value": ("adapter", _adapter_value, 1),
    "adapter: header": ("adapter", _header_bytes, 1),
    "adapter: shape": ("adapter", _shape, 1),
    "adapter: cycle": ("adapter", _adapter_cycle, 0.2),
    "gguf: header": ("gguf", _on("model.gguf", lambda rng, path: _flip(rng, path, 0, 2500)), 3),
    "gguf: bytes": ("gguf", _on("model.gguf", _flip), 1),
    "gguf: truncated": ("gguf", _on("model.gguf", _truncate), 1),
    "quantised: header": ("quantised", _header_bytes, 1),
    "quantised: bytes": ("quantised", _on("model.safetensors", _flip), 0.5),
    "quantised: dtype": ("quantised", _same_size, 1),
    "quantised: shape": ("quantised", _shape, 0.5),
    "quantised: names of scales": ("quantised", _scale_names, 1),
    "quantised: a tensor is gone": ("quantised", _without_tensor, 1),
    "quantised: config": ("quantised", _config_value, 1),
    "tokenizer": ("whole", _on("tokenizer.json", _flip), 1),
    "tokenizer: config": ("whole", _on("tokenizer_config.json", _flip), 0.5),
}
"""Name -> layout, mutation, and how often it is drawn."""
