"""Files of weights in formats that are not read here, named for what they are."""

from pathlib import Path

_BY_NAME = {
    "tf_model*.h5": ("TensorFlow weights", "load them with transformers 4 (`from_tf=True`), save as safetensors"),
    "*.msgpack": ("Flax weights", "load them with transformers 4 (`from_flax=True`), save as safetensors"),
    "consolidated*.pth": ("weights in Meta's original format", "convert them with transformers' conversion script"),
    "*.pt": ("a file of torch.save", "if it is the flat state dict of the model, rename it to pytorch_model.bin"),
    "*.pth": ("a file of torch.save", "if it is the flat state dict of the model, rename it to pytorch_model.bin"),
    "*.ckpt": ("a training checkpoint", "export the model's state dict as safetensors"),
    "*.distcp": ("a distributed checkpoint of PyTorch", "consolidate it with torch.distributed.checkpoint"),
    "*_optim_states.pt": ("a DeepSpeed checkpoint", "consolidate it with its zero_to_fp32.py"),
    "*.onnx": ("an ONNX graph", "use the checkpoint that it was exported from"),
    "*.npz": ("numpy arrays, as MLX wrote them", "save them as safetensors"),
    "*.ot": ("weights for rust-bert", "use the checkpoint that they were converted from"),
    "*.nemo": ("a NeMo archive", "export it to Hugging Face format"),
    "ggml*.bin": ("a GGML file, the format before GGUF", "convert it to GGUF with llama.cpp"),
}
_ORIGINAL = "consolidated"
_BY_START = {
    b"GGUF": "a GGUF file; name it *.gguf",
    b"ggjt": "a GGML file, the format before GGUF; convert it with llama.cpp",
    b"lmgg": "a GGML file, the format before GGUF; convert it with llama.cpp",
    b"\x89HDF": "an HDF5 file, as TensorFlow writes; load it with transformers 4 (`from_tf=True`)",
    b"PK\x03\x04": "a zip file, as torch.save writes; if it is the model's flat state dict, name it pytorch_model.bin",
    b"\x80\x02": "a pickle, as PyTorch before 1.6 wrote; if you trust its author, load it with PyTorch, save it again",
    b"<!DO": "a web page; sign in, and download the file itself",
    b"<htm": "a web page; sign in, and download the file itself",
    b"<!do": "a web page; sign in, and download the file itself",
}


def foreign_weights(folder: Path) -> str | None:
    """Returns what the files in a folder without weights are, and what to do; None if none is known."""
    for pattern, (kind, remedy) in _BY_NAME.items():
        if found := sorted(folder.glob(pattern)):
            return f"{found[0].name} is {kind}, which is not read here; {remedy}"
    return None


def original_format(path: Path) -> str | None:
    """Returns what a safetensors file is whose tensors have the names of Mistral's or Meta's own code, or None."""
    if not path.name.startswith(_ORIGINAL):
        return None
    return f"{path.name} is in its makers' original format, with other names of tensors; download model*.safetensors"


def content_of(path: Path) -> str | None:
    """Returns what a file is by its first bytes, where that is not what its name says, and what to do."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((kind for magic, kind in _BY_START.items() if start.startswith(magic)), None)
