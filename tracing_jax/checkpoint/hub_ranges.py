"""Weights of the Hub that are read in ranges of bytes, where a run needs a small part of them: nothing is kept."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.safetensors_file import SafetensorsFile, Target
from tracing_jax.checkpoint.safetensors_header import MAX_HEADER_BYTES, HeaderError, read_header

_REQUESTS_AT_ONCE = 16
_TRIES = 4
"""For an answer that breaks off; requests that are refused or time out are repeated by huggingface_hub."""


class RangesIgnoredError(CheckpointError):
    """A server answered a request for a range of a file with the whole file, which was not read."""


class HubSafetensors(SafetensorsFile):
    """A safetensors file on the Hub; each contiguous range of a slice is one request, several at a time."""

    def __init__(self, repo: str, commit: str, name: str) -> None:
        """Reads the header, in two requests.

        Raises:
            RangesIgnoredError: The server gives the file as a whole only.
            CheckpointError: It cannot be read, is no safetensors file, or holds a dtype that is not read.
        """
        self._url = hf_hub_url(repo, name, revision=commit)
        self._storage: str | None = None
        """The address that the Hub redirects to: asking there saves a redirect a range, and the Hub's rate limit."""
        self._where = PurePosixPath(f"{repo}@{commit[:12]}") / name
        size = int.from_bytes(self._bytes(0, 8), "little")
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self._where}: not a safetensors file; its header would have {size} bytes")
        try:
            self._take_tensors(read_header(self._bytes(8, size)), size)
        except HeaderError as error:
            kind = "" if error.is_unsupported else "not a safetensors file: "
            raise CheckpointError(f"{self._where}: {kind}{error}") from None

    def files(self) -> tuple[Path, ...]:
        """None: no file of it is on this machine."""
        return ()

    def _fill(self, targets: Sequence[Target]) -> None:
        def fill(target: Target) -> None:
            start, memory = target
            content = self._bytes(start, len(memory))
            if len(content) != len(memory):
                raise CheckpointError(f"{self._where}: ends before byte {start + len(memory)}; its header is wrong")
            memory[:] = content

        if len(targets) == 1:
            fill(targets[0])
            return
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            list(pool.map(fill, targets))  # raises what the first of them that failed has raised

    def _bytes(self, start: int, size: int) -> bytes:
        """Returns `size` bytes from `start` on; fewer at the end of the file.

        Raises:
            RangesIgnoredError: The answer would be the whole file.
            CheckpointError: There is no answer, or only parts of it, after several tries.
        """
        asked = {"Range": f"bytes={start}-{start + size - 1}"}
        try:
            for _ in range(_TRIES):
                # A RuntimeError: another thread could not connect, and closed the client that all threads share.
                with contextlib.suppress(RuntimeError):
                    if (content := self._ask(asked)) is not None:
                        return content
        except HTTPError as error:
            # No chained traceback: it would show request addresses, which can be signed.
            raise CheckpointError(f"{self._where}: the Hub cannot be read ({type(error).__name__})") from None
        raise CheckpointError(f"{self._where}: the Hub's answers broke off {_TRIES} times; try again")

    def _ask(self, asked: dict[str, str]) -> bytes | None:
        """Returns the content of one answer; None if it broke off, or if the storage did not answer: ask once more."""
        storage = self._storage
        url, headers = (storage, asked) if storage else (self._url, {**build_hf_headers(), **asked})
        # Repeated requests are logged with their address. That of the storage is signed, so the Hub is asked again.
        once: dict[str, Any] = (
            {"max_retries": 0, "retry_on_exceptions": (), "retry_on_status_codes": ()} if storage else {}
        )
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=timeout, **once) as answer:
                if answer.status_code == 206:
                    content = _content(answer)
                    if content is not None and urlsplit(str(answer.url)).netloc != urlsplit(self._url).netloc:
                        self._storage = str(answer.url)
                    return content
                if not storage:
                    hf_raise_for_status(answer)
                    raise RangesIgnoredError(
                        f"{self._where}: the server ignores requests for a range of bytes (it answered "
                        f"{answer.status_code}, not 206)"
                    )
        except HTTPError:
            if not storage:
                raise
        self._storage = None
        return None


def _content(answer: Any) -> bytes | None:
    try:
        return answer.read()
    except HTTPError:  # not raised here: http_stream_backoff would ask again, although this request has ended
        return None
