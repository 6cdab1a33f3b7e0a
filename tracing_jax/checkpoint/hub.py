"""From a model id to a folder on this machine: a local folder, or a download of the Hugging Face Hub."""

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from absl import logging
from huggingface_hub import HfApi, constants, file_exists, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.foreign_files import foreign_weights
from tracing_jax.checkpoint.hub_ranges import HubSafetensors, RangesIgnoredError
from tracing_jax.checkpoint.tensors import MissingFileOpener, TensorStore, listing, open_file, weight_map
from tracing_jax.error_messages import listed, shortened

_TEXTS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "merges.txt",
    "chat_template*",
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_MAX_ID = 1000
AS_HUB_ID = "As a model of the Hub"
"""The prefix of a problem of the Hub, where a name may be meant otherwise."""
_GGUF_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_IGNORED = ("*/*", "consolidated*", "optimizer*")


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder with a config and weights, or with GGUF files; `revision` is the commit if it came from the Hub.

    Attributes:
        folder: With the files.
        id: What the user asked for.
        revision: The commit, or None.
        gguf: The files of a model in GGUF format, the one with the metadata first; empty for other models.
    """

    folder: Path
    id: str
    revision: str | None
    gguf: tuple[Path, ...] = ()


def resolve(
    model_id: str, download_dir: str | None = None, weights: bool = True, config: bool = True
) -> CheckpointFolder:
    """The folder that holds `model_id`, downloaded if it must be.

    Args:
        model_id: A local folder or GGUF file, or `org/name` or `org/name@revision` on the Hub, or
            `org/name/file.gguf`. What begins with `/`, `.` or `~`, or exists here, is never looked up on the Hub.
        download_dir: Where downloads are kept; by default huggingface_hub's cache, whose environment variables
            (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) are honoured.
        weights: Whether weights are downloaded too. Without, of a model on the Hub that has safetensors, only its texts
            are; what its folder lacks can be read with `on_hub`.
        config: Whether a model without a config is refused.

    Raises:
        CheckpointError: No such folder or model, no access to it, or no config or weights in it.
    """
    if len(model_id) > _MAX_ID or "\0" in model_id:  # an adapter's config may name anything as its base
        raise CheckpointError(f"{shortened(repr(model_id))} is no path and no id of a model")
    local = Path(os.path.expanduser(model_id))  # leaves "~nobody" as it is, where pathlib raises
    if here := _here(model_id, local):
        if here.gguf:
            return here
        found = here
    elif model_id.partition("@")[0].endswith(".gguf"):
        return _download_gguf(model_id, download_dir)
    elif not weights and (texts := _texts(model_id, download_dir)):
        return texts
    else:
        found = _download(model_id, download_dir)
        _check_readable(found)
    if paths := _only_gguf(found.folder):
        return replace(found, gguf=paths)
    _check(found, config)
    return found


def _here(model_id: str, local: Path) -> CheckpointFolder | None:
    """The local folder or GGUF file of that name, all of whose files can be read; None if a model of the Hub is meant.

    Raises:
        CheckpointError: A path that is no folder, or no permission to read it.
    """
    with _denied(model_id, local):
        if not model_id.startswith(("/", ".", "~")) and not local.exists():
            return None
        if local.suffix == ".gguf" and local.is_file():
            found = CheckpointFolder(local.parent, model_id, None, _shards_of(local))
        elif not local.is_dir():
            raise CheckpointError(f"{model_id!r} is {'a file' if local.exists() else 'no folder'}; expected a folder")
        else:
            found = CheckpointFolder(local, model_id, None)
    _check_readable(found)
    return found


@contextlib.contextmanager
def _denied(model_id: str, path: Path) -> Iterator[None]:
    """Turns a missing permission into a CheckpointError."""
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"{model_id!r}: no permission to read {error.filename or path}; expected files that this user may read: "
            f"`chmod -R u+rX {path}`, or ask their owner"
        ) from None


def _check_readable(found: CheckpointFolder) -> None:
    """Opens every file of a model that a run may read, and reads nothing.

    Raises:
        CheckpointError: There is no permission to.
    """
    wanted = (*_TEXTS, *_INDICES, *_WEIGHT_FILES, "*.gguf")
    with _denied(found.id, found.folder):
        names = sorted(entry.name for entry in os.scandir(found.folder) if entry.is_file()) if not found.gguf else []
        files = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
        for path in found.gguf or [found.folder / name for name in files]:
            try:
                with open(path, "rb"):
                    pass
            except PermissionError as error:
                raise PermissionError(error.errno, error.strerror, str(path)) from None


def _only_gguf(folder: Path) -> tuple[Path, ...]:
    """The GGUF files of the one model in a folder that holds no other weights; empty if there is none.

    Raises:
        CheckpointError: It holds several.
    """
    found = sorted(folder.glob("*.gguf"))
    if not found or any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        return ()
    models = sorted({_shards_of(path) for path in found})
    if len(models) > 1:
        names = listed([paths[0].name for paths in models])
        raise CheckpointError(f"{folder}: several GGUF models, {names}; name one of the files")
    return models[0]


def _shards_of(path: Path) -> tuple[Path, ...]:
    """The files of a GGUF model of which `path` is one: itself, or all shards of its name.

    Raises:
        CheckpointError: Shards are missing.
    """
    match = _GGUF_SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= count <= 1000:
        raise CheckpointError(f"{path}: its name says {count} shards")
    paths = [path.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    if missing := [shard.name for shard in paths if not shard.is_file()]:
        raise CheckpointError(f"{path}: of its {count} shards {listed(missing)} are missing; download them too")
    return tuple(paths)


def _download_gguf(model_id: str, download_dir: str | None) -> CheckpointFolder:
    """The GGUF file `org/name/path.gguf` of the Hub, with the other shards of its name."""
    name, _, revision = model_id.partition("@")
    repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if not file:
        raise CheckpointError(f"{model_id!r}: expected org/name/file.gguf")
    match = _GGUF_SHARD.fullmatch(file)
    pattern = f"{match['stem']}-*-of-{match['count']}.gguf" if match else file
    with _explained(model_id):
        found = snapshot_download(repo, revision=revision or None, cache_dir=download_dir, allow_patterns=[pattern])
    path = Path(found) / file
    if not path.is_file():
        raise CheckpointError(f"{repo!r} has no file {file!r}; its files are at {constants.ENDPOINT}/{repo}/tree/main")
    return CheckpointFolder(path.parent, model_id, Path(found).name, _shards_of(path))


def hub_problem(model_id: str) -> str | None:
    """Why a model of the Hub cannot be read, by its list of files and its texts; None if nothing is found against it.

    Nothing does where the Hub cannot be asked. No weights are downloaded.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    name, _, revision = model_id.partition("@")
    repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    wanted = (file,) if file else (*_WEIGHT_FILES, "*.gguf")
    try:
        names = HfApi().list_repo_files(repo, revision=revision or None)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in wanted):
            return f"{model_id!r} has no weights ({', '.join(wanted)}); its files are {listed(names)}"
        _snapshot(repo, revision or None, None, _TEXTS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:  # the first: gated ones too
        return _explain(error, model_id)
    except (HTTPError, LocalEntryNotFoundError):
        return None
    return None


def tokenizer_folder(model_id: str) -> Path:
    """The folder that holds the tokenizer of a local folder or Hub id; no weights are downloaded.

    Raises:
        CheckpointError: No such folder or model, or no access to it.
    """
    local = Path(os.path.expanduser(model_id))
    if local.is_dir():
        return local
    repo, _, revision = model_id.partition("@")
    with _explained(model_id):
        return _snapshot(repo, revision or None, None, _TEXTS)


def on_hub(found: CheckpointFolder, download_dir: str | None = None) -> MissingFileOpener:
    """Opens the safetensors files of a model that are on the Hub and not in its folder, to be read in ranges.

    A file of which the server gives no ranges is downloaded.
    """
    repo = found.id.partition("@")[0]

    def open_missing(name: str) -> TensorStore | None:
        if found.revision is None:
            return None
        try:
            return HubSafetensors(repo, found.revision, name)
        except RangesIgnoredError as error:
            logging.warning("%s; it is downloaded now", error)
        with _explained(found.id):
            return open_file(Path(hf_hub_download(repo, name, revision=found.revision, cache_dir=download_dir)))

    return open_missing


def _texts(model_id: str, download_dir: str | None) -> CheckpointFolder | None:
    """The folder with all of a model but its weights; None if these are not safetensors, or belong to an adapter."""
    repo, _, revision = model_id.partition("@")
    with _explained(model_id):
        folder = _snapshot(repo, revision or None, download_dir, (*_TEXTS, "*.safetensors.index.json"))
        if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return None
        for name in ("model.safetensors.index.json", "model.safetensors"):
            is_cached = (folder / name).is_file()
            if is_cached or (not constants.HF_HUB_OFFLINE and file_exists(repo, name, revision=folder.name)):
                return CheckpointFolder(folder, model_id, folder.name)
    return None


def _download(model_id: str, download_dir: str | None) -> CheckpointFolder:
    """The folder with a model's texts and with its weights in the preferred format; other files are not downloaded."""
    repo, _, revision = model_id.partition("@")
    with _explained(model_id):
        folder = _snapshot(repo, revision or None, download_dir, (*_TEXTS, *_INDICES))
        for patterns in _formats(folder):
            _snapshot(repo, folder.name, download_dir, patterns)
            if any(any(folder.glob(pattern)) for pattern in patterns):
                break
    return CheckpointFolder(folder, model_id, folder.name)


def _formats(folder: Path) -> Iterator[tuple[str, ...]]:
    """Yields the files of weights that a model may have, those that transformers prefers first, shards by its index."""
    if (folder / "adapter_config.json").is_file():
        yield ("adapter_model.safetensors",)
        yield ("adapter_model.bin",)
    for index in _INDICES:
        yield (index.removesuffix(".index.json"),)
        if (folder / index).is_file():
            yield tuple(sorted(set(weight_map(folder / index).values())))
    yield ("*.safetensors",)


def _snapshot(repo: str, revision: str | None, download_dir: str | None, patterns: Iterable[str]) -> Path:
    """The folder of a commit in the Hub's cache, named by the commit, with the files that match a pattern."""
    found = snapshot_download(
        repo, revision=revision, cache_dir=download_dir, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
    )
    return Path(found)


@contextlib.contextmanager
def _explained(model_id: str) -> Iterator[None]:
    """Turns errors of the Hub into a CheckpointError."""
    try:
        yield
    except (HTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        # No chained traceback: it would show request addresses, which can be signed.
        raise CheckpointError(_explain(error, model_id)) from None


def _explain(error: Exception, model_id: str) -> str:
    """The error of the Hub and its remedy; of a bare name, as a mistyped folder is, first that none is here."""
    if "/" in model_id:
        return _explain_hub(error, model_id)
    return f"no folder {model_id!r} here ({Path.cwd()}). {AS_HUB_ID}: {_explain_hub(error, model_id)}"


def _explain_hub(error: Exception, model_id: str) -> str:
    """The error of the Hub and its remedy; never quotes a request, which may carry a secret."""
    repo, _, revision = model_id.partition("@")
    page = f"{constants.ENDPOINT}/{repo}"
    sign_in = "set HF_TOKEN or run `hf auth login`"
    match error:
        case GatedRepoError():
            return f"{repo!r} is gated: accept its licence at {page}, then {sign_in}"
        case RevisionNotFoundError():
            return f"{repo!r} has no revision {revision!r}; its branches, tags and commits are at {page}/tree/main"
        case RepositoryNotFoundError() | HFValidationError():
            return (
                f"{model_id!r} is neither a folder (looked in {Path.cwd()}) nor a model on the Hub (tried at {page}); "
                f"check the spelling of the path or of org/name, and if the model is private, {sign_in}"
            )
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"{model_id!r} is not (completely) in the cache and HF_HUB_OFFLINE forbids a download; unset it once"
        case LocalEntryNotFoundError():
            cause = type(error.__cause__ or error).__name__
            return (
                f"{model_id!r} is not (completely) in the cache and {page} cannot be read ({cause}); check the network"
            )
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"answered {status}" if status else f"broke off ({type(error).__name__})"
    return f"{model_id!r}: {constants.ENDPOINT} {reason}; try again, and if it asks for a sign-in (401), {sign_in}"


def _check(found: CheckpointFolder, config: bool) -> None:
    files = [path.name for path in found.folder.iterdir()]
    wanted = {
        "config.json (or adapter_config.json)": "config.json" in files or "adapter_config.json" in files or not config,
        "weights (*.safetensors, pytorch_model*.bin or *.gguf)": any(any(found.folder.glob(w)) for w in _WEIGHT_FILES),
    }
    missing = [what for what, is_there in wanted.items() if not is_there]
    if missing:
        held = foreign_weights(found.folder) or f"{found.folder} holds {listing(found.folder)}"
        if found.revision:
            held += "; a GGUF file on the Hub is named org/name/file.gguf"
        raise CheckpointError(f"{found.id!r} has no {' and no '.join(missing)}; {held}")
