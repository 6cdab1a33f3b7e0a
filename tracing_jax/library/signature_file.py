"""The file of a signature: safetensors with one JSON header, at most 256 KiB.

Such a file may hold anything. It is never executed, and all of it is checked before any of it is
used: versions, names, types, shapes and ranges, so that what is read back is as `make_signature` could have made it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from tracing_jax.error_messages import listed, shortened
from tracing_jax.library import drawing
from tracing_jax.library.heads import HEAD_FORMS, SampledHeads
from tracing_jax.library.readings import GATED, GATELESS, moment_names, moment_numbers
from tracing_jax.library.signature import (
    MOST_CHARACTERS,
    MOST_LISTED_FILES,
    SHAPE,
    SIGNATURE_FORMAT,
    SampledLayer,
    Signature,
)
from tracing_jax.record import atomic_write

MAX_BYTES = 256 * 1024
SUFFIX = ".signature.safetensors"

_HEADER = "tracing_jax_signature"
_READ = ((SIGNATURE_FORMAT, drawing.RULE), (1, drawing.EARLIER_RULE))
_HASH = re.compile("[0-9a-f]{64}")
_MOST_HEADS = 4096  # of a layer: those of a null whose cost grows with their square
_LARGEST = 2**53  # of a whole number in the header
_ROUNDING = 0.01  # of a correlation in 16 bits
_LEAST_EIGENVALUE = -0.05  # of 35 such correlations; half of what is added when they are used


def to_bytes(signature: Signature) -> bytes:
    """Returns the file of a signature: safetensors, whose only metadata is the header as JSON.

    Raises:
      ValueError: it would be larger than `MAX_BYTES`.
    """
    strings = [token.encode("utf-8", "surrogatepass") for token in signature.tokens]
    tensors: dict[str, np.ndarray] = {
        "tokens": np.frombuffer(b"".join(strings), np.uint8),
        "token_lengths": np.array([len(string) for string in strings], np.uint8),
    }
    for found in signature.layers:
        at = f"layers/{found.layer}"
        tensors[f"{at}/units"] = np.ascontiguousarray(found.units, np.int32)
        for part, arrays in (("", found.readings), ("moments ", found.moments), ("covariance ", found.covariances)):
            tensors |= {f"{at}/{part}{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
    for sampled in signature.heads:
        at = f"heads/{sampled.layer}"
        tensors[f"{at}/heads"] = np.ascontiguousarray(sampled.heads, np.int32)
        tensors |= {f"{at}/{name}": np.ascontiguousarray(array) for name, array in sampled.forms.items()}
    header = json.dumps(signature.facts, sort_keys=True, separators=(",", ":"))
    written = safetensors.numpy.save(tensors, metadata={_HEADER: header})
    if len(written) > MAX_BYTES:
        raise ValueError(f"the signature of {signature.model} has {len(written):,} bytes, more than {MAX_BYTES:,}")
    return written


def write_signature(signature: Signature, path: Path) -> None:
    """Writes the file of a signature, replacing it as a whole."""
    atomic_write(path, to_bytes(signature))


def read_signature(path: Path) -> Signature:
    """Returns the signature in a file; whatever the file holds, it is only parsed.

    Raises:
      ValueError: it is no signature, is damaged, or is of another version; with the reason.
      OSError: there is no such file, or it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        return from_bytes(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a signature of `tracing-jax signature`: {shortened(error, 300)}") from None


def from_bytes(content: bytes) -> Signature:
    """Returns the signature in the content of a file.

    Raises:
      ValueError: the first thing that is wrong with it.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES:,} bytes, found more")
    facts = _facts_of(content)
    _check(facts)
    try:
        tensors = safetensors.numpy.load(content)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its tensors cannot be read: {shortened(error)}") from None
    return _parsed(facts, tensors)


def _facts_of(content: bytes) -> dict[str, Any]:
    """Returns the header, if it is of this format and rule."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("it is no safetensors file, or is cut off")
    try:
        facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_HEADER])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"it has no header {_HEADER}") from None
    if not isinstance(facts, dict) or "format" not in facts or "rule" not in facts:
        raise ValueError("its header has no format and rule")
    if (facts["format"], facts["rule"]) not in _READ:
        found = f"{shortened(facts['format'], 20)} and {shortened(facts['rule'], 40)}"
        raise ValueError(
            f"expected format {SIGNATURE_FORMAT} and rule {drawing.RULE}, found {found}; make it again with this "
            "version"
        )
    return facts


def _check(facts: Mapping[str, Any]) -> None:
    """Raises the first thing that is wrong with a header."""
    for name in ("model", "family"):
        if not _is_name(facts.get(name)):
            raise ValueError(f"header: {name} is {shortened(repr(facts.get(name)))}, expected printable text")
    if facts.get("revision") is not None and not _is_name(facts["revision"]):
        raise ValueError(f"header: revision is {shortened(repr(facts['revision']))}, expected printable text")
    if not _is_hash(facts.get("digest")):
        raise ValueError(f"header: digest is {shortened(repr(facts.get('digest')))}, expected 64 digits of a SHA-256")
    _check_files(facts)
    if facts.get("readings") not in (list(GATED), list(GATELESS)):
        raise ValueError(
            f"header: readings are {shortened(repr(facts.get('readings')))}, expected those of this version"
        )
    shape = facts.get("shape")
    if not isinstance(shape, dict) or not all(
        shape.get(name, -1) is None or _is_count(shape.get(name)) or name == "gated" for name in _shape_of(facts)
    ):
        raise ValueError("header: the shape is damaged")
    if not _is_count(shape["embed_dim"]) or shape.get("gated") is not (facts["readings"] == list(GATED)):
        raise ValueError("header: the shape has no width, or is of other MLPs than the readings")
    layers, depth = facts.get("layers"), facts.get("of_layers")
    if not isinstance(layers, list) or not 1 <= len(layers) <= drawing.LAYERS or not all(map(_is_count, layers)):
        raise ValueError(f"header: layers are {shortened(repr(layers))}, expected 1 to {drawing.LAYERS} numbers")
    if not _is_count(depth) or layers != drawing.sampled_layers(depth):
        raise ValueError(f"header: layers {layers} of {shortened(repr(depth))} are not those that the rule samples")
    if facts["format"] > 1:
        _check_head_layers(facts)


def _shape_of(facts: Mapping[str, Any]) -> Sequence[str]:
    """Returns the names of the facts of the shape, of which the first version had no heads."""
    return SHAPE if facts["format"] > 1 else SHAPE[:-2]


def _check_head_layers(facts: Mapping[str, Any]) -> None:
    layers, shape = facts.get("head_layers"), facts["shape"]
    if not isinstance(layers, list) or len(layers) > drawing.LAYERS or not all(map(_is_count, layers)):
        raise ValueError(f"header: head_layers are {shortened(repr(layers))}, expected up to {drawing.LAYERS} numbers")
    if layers != sorted({*layers}) or not all(layer < (shape["num_layers"] or 0) for layer in layers):
        raise ValueError(f"header: head_layers {layers} are not layers of the model in increasing order")
    heads = (shape["num_kv_heads"] or 0) * (shape["q_group"] or 0)
    if layers and not 2 <= heads <= _MOST_HEADS:
        raise ValueError(f"header: a model of {heads} query heads has none to sample")


def _check_files(facts: Mapping[str, Any]) -> None:
    files, count = facts.get("files"), facts.get("num_files")
    if not isinstance(files, dict) or len(files) > MOST_LISTED_FILES or not _is_count(count):
        raise ValueError(f"header: expected the hashes of at most {MOST_LISTED_FILES} weight files, and their number")
    if not all(map(_is_name, files)) or not all(map(_is_hash, files.values())):
        raise ValueError("header: the hashes of the weight files are damaged")
    if count <= MOST_LISTED_FILES and (len(files) != count or drawing.model_digest(files) != facts["digest"]):
        raise ValueError("header: the digest is not that of the weight files in the header")


def _is_name(found: Any) -> bool:
    return isinstance(found, str) and 0 < len(found) <= 2 * MOST_CHARACTERS and found.isprintable()


def _is_hash(found: Any) -> bool:
    return isinstance(found, str) and _HASH.fullmatch(found) is not None


def _is_count(found: Any) -> TypeGuard[int]:
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < _LARGEST


def _parsed(facts: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Signature:
    layers, kinds = facts["layers"], facts["readings"]
    moments = [f"{part} {kind}" for part in ("moments", "covariance") for kind in moment_names(facts["shape"]["gated"])]
    with_moments = any("/moments " in name for name in tensors)
    expected = {"tokens", "token_lengths"} | {
        f"layers/{i}/{part}" for i in layers for part in ("units", *kinds, *(moments if with_moments else ()))
    }
    head_layers = facts["head_layers"] if facts["format"] > 1 else []
    expected |= {f"heads/{i}/{part}" for i in head_layers for part in ("heads", *HEAD_FORMS)}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"it lacks the tensors {listed(missing)}")
    if more := sorted(tensors.keys() - expected):
        raise ValueError(f"it has tensors that do not belong in a signature: {listed(map(repr, more))}")
    tokens = _tokens(tensors["tokens"], tensors["token_lengths"])
    most = drawing.most_tokens(facts["shape"]["embed_dim"], facts["rule"])
    if len(tokens) > most:
        raise ValueError(f"{len(tokens)} token strings, a model of this width is sampled at {most} at most")
    sampled = tuple(_layer(i, facts, len(tokens), with_moments, tensors) for i in layers)
    return Signature(facts, tokens, sampled, tuple(_heads(i, facts, len(tokens), tensors) for i in head_layers))


def _tokens(text: np.ndarray, lengths: np.ndarray) -> tuple[str, ...]:
    _check_array("tokens", text, np.uint8, None)
    _check_array("token_lengths", lengths, np.uint8, None)
    ends = np.cumsum(lengths.astype(int))
    if not len(ends) or len(text) != ends[-1] or lengths.max() > drawing.MAX_STRING:
        raise ValueError(f"its token strings are damaged: expected strings of at most {drawing.MAX_STRING} bytes")
    content = text.tobytes()
    try:
        found = [content[end - n : end].decode("utf-8", "surrogatepass") for end, n in zip(ends, lengths.tolist())]
    except UnicodeDecodeError:
        raise ValueError("its token strings are no UTF-8") from None
    if len(set(found)) < len(found):
        raise ValueError("a token string occurs twice in it")
    return tuple(found)


def _check_array(name: str, found: np.ndarray, dtype: Any, shape: Sequence[int] | None) -> None:
    """Raises ValueError if an array is not of this type and shape; None is any length of one axis."""
    if found.dtype != dtype or (found.ndim != 1 if shape is None else found.shape != tuple(shape)):
        wanted = "one axis" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{name}: found {found.dtype} of shape {found.shape}, expected {np.dtype(dtype)} of {wanted}")


def _layer(
    layer: int, facts: Mapping[str, Any], num_tokens: int, with_moments: bool, tensors: Mapping[str, np.ndarray]
) -> SampledLayer:
    at = f"layers/{layer}"
    units = tensors[f"{at}/units"]
    _check_array(f"{at}/units", units, np.int32, None)
    if not 2 <= len(units) <= drawing.UNITS or units.min() < 0 or len(np.unique(units)) < len(units):
        raise ValueError(f"{at}/units: expected 2 to {drawing.UNITS} different units")
    readings = {kind: tensors[f"{at}/{kind}"] for kind in facts["readings"]}
    for kind, found in readings.items():
        _check_array(f"{at}/{kind}", found, np.int8, (len(units), num_tokens))
    moments, covariances, M = {}, {}, moment_numbers(facts["shape"]["gated"])
    for kind in moment_names(facts["shape"]["gated"]) if with_moments else ():
        moments[kind], covariances[kind] = (tensors[f"{at}/{part} {kind}"] for part in ("moments", "covariance"))
        rows = len(moments[kind])
        if not len(units) <= rows <= drawing.MOMENT_UNITS:
            raise ValueError(f"{at}/moments {kind}: {rows} rows, expected {len(units)} to {drawing.MOMENT_UNITS}")
        _check_array(f"{at}/moments {kind}", moments[kind], np.int8, (rows, M))
        _check_array(f"{at}/covariance {kind}", covariances[kind], np.float16, (M, M))
        if not _is_correlation(covariances[kind].astype(np.float64)):
            raise ValueError(f"{at}/covariance {kind}: expected correlations: finite, symmetric, and none negative")
    return SampledLayer(layer, units, readings, moments, covariances)


def _heads(layer: int, facts: Mapping[str, Any], num_tokens: int, tensors: Mapping[str, np.ndarray]) -> SampledHeads:
    at, most = f"heads/{layer}", facts["shape"]["num_kv_heads"] * facts["shape"]["q_group"]
    heads, T = tensors[f"{at}/heads"], min(num_tokens, drawing.HEAD_TOKENS)
    _check_array(f"{at}/heads", heads, np.int32, None)
    if (
        not 2 <= len(heads) <= drawing.HEADS
        or len(np.unique(heads)) < len(heads)
        or not np.all((heads >= 0) & (heads < most))
    ):
        raise ValueError(f"{at}/heads: expected 2 to {drawing.HEADS} different heads of {most}")
    forms = {name: tensors[f"{at}/{name}"] for name in HEAD_FORMS}
    for name, found in forms.items():
        _check_array(f"{at}/{name}", found, np.int8, (len(heads), T * T))
    return SampledHeads(layer, heads, forms)


def _is_correlation(square: np.ndarray) -> bool:
    """Returns whether a matrix is finite, symmetric, of entries up to one, and without negative eigenvalues."""
    if not np.isfinite(square).all() or np.abs(square).max() > 1 + _ROUNDING:
        return False
    return bool(np.abs(square - square.T).max() <= _ROUNDING and np.linalg.eigvalsh(square)[0] >= _LEAST_EIGENVALUE)
