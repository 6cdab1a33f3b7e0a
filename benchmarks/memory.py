"""The most anonymous memory that a process held: heap and arrays, without the pages of files that it reads or maps.

The kernel keeps a high-water mark of resident memory only with file pages, which are free to take whenever there is
need. So the anonymous part is sampled on a thread.
"""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SECONDS_BETWEEN = 0.02  # an array that lives shorter is missed
_RSS_ANON = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


@dataclass
class Peak:
    """What was seen so far, in bytes.

    Attributes:
      peak_bytes: the largest sample.
      start_bytes: the first one: interpreter and imports.
    """

    peak_bytes: int
    start_bytes: int


def anonymous_bytes() -> int:
    """Returns the resident anonymous memory of this process.

    Raises:
      OSError: the system has no /proc/self/status.
      ValueError: it does not say.
    """
    status = Path("/proc/self/status").read_text("utf-8")
    found = _RSS_ANON.search(status)
    if found is None:
        raise ValueError("/proc/self/status has no RssAnon line; Linux 4.5 or newer is needed")
    return 1024 * int(found[1])


@contextlib.contextmanager
def peak_anonymous_bytes() -> Iterator[Peak]:
    """Samples the anonymous memory of this process while the block runs; read `peak_bytes` at its end."""
    now = anonymous_bytes()
    peak, done = Peak(now, now), threading.Event()

    def sample() -> None:
        while not done.wait(_SECONDS_BETWEEN):
            peak.peak_bytes = max(peak.peak_bytes, anonymous_bytes())

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.peak_bytes = max(peak.peak_bytes, anonymous_bytes())
