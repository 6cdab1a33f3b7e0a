"""Weights of the Hub that are read in ranges of bytes, where a run needs a small part of them: nothing is kept."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile


class HubSafetensors(SafetensorsFile):
    """A safetensors file on the Hub; each contiguous run of a slice is one request."""

    def __init__(self, repo: str, commit: str, name: str) -> None:
        """Reads the header, in two requests.

        Raises:
            CheckpointError: It cannot be read, is no safetensors file, or holds a dtype that is not read.
        """
        self._url = hf_hub_url(repo, name, revision=commit)
        self._where = PurePosixPath(f"{repo}@{commit[:12]}") / name
        size = int.from_bytes(self._bytes(0, 8), "little")
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self._where}: not a safetensors file; its header would have {size} bytes")
        try:
            header: dict[str, Any] = json.loads(self._bytes(8, size))
        except ValueError as error:
            raise CheckpointError(f"{self._where}: not a safetensors file ({type(error).__name__})") from None
        self._take_header(self._where, header, size)

    def files(self) -> tuple[Path, ...]:
        """None: no file of it is on this machine."""
        return ()

    @contextlib.contextmanager
    def _filling(self) -> Iterator[Callable[[memoryview, int], None]]:
        def fill(room: memoryview, start: int) -> None:
            room[:] = self._bytes(start, len(room))

        yield fill

    def _bytes(self, start: int, size: int) -> bytes:
        asked = {**build_hf_headers(), "Range": f"bytes={start}-{start + size - 1}"}
        try:
            answer = get_session().get(self._url, headers=asked, follow_redirects=True)
            hf_raise_for_status(answer)
        except HTTPError as error:
            # No chained traceback: it would show request addresses, which can be signed.
            raise CheckpointError(f"{self._where}: the Hub cannot be read ({type(error).__name__})") from None
        if answer.status_code != 206 or len(answer.content) != size:
            raise CheckpointError(
                f"{self._where}: the Hub answered {answer.status_code} with {len(answer.content)} bytes where {size} "
                "were asked for; download the model first, and trace the copy"
            )
        return answer.content
