"""What the figures of a benchmark belong to."""

import os
import platform
from datetime import UTC, datetime
from typing import Any

import jax

from tracing_jax.record import commit

_HASH = 10  # digits that a reader needs


def machine() -> dict[str, Any]:
    """Returns date, commit, device and versions, and a `summary` of them in one line."""
    device, cores = jax.devices()[0], len(os.sched_getaffinity(0))
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "platform": device.platform,
        "cores": cores,
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    where = f"{cores} cores, {platform.machine()}" if device.platform == "cpu" else facts["device"]
    made_of, _, dirty = str(facts["commit"]).partition("-")
    short = made_of[:_HASH] + (f"-{dirty}" if dirty else "")
    return facts | {"summary": f"{facts['date']}, commit {short}, {where}, jax {jax.__version__}"}
