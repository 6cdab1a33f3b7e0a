"""What every benchmark needs: its folders, one CPU device per core, and a line on the machine it ran on."""

import os
import platform
from datetime import UTC, datetime
from typing import Any

import jax
from absl import flags

from tracing_jax.record import commit

ZOO_DIR = flags.DEFINE_string("zoo_dir", "runs/zoo", "folder that keeps the trained models")
OUT_DIR = flags.DEFINE_string("out_dir", "runs/benchmarks", "folder for tables and figures")
PUBLISH = flags.DEFINE_bool("publish", False, "replace what the package and its docs hold of this benchmark")

_HASH = 10  # digits of the commit in the summary


def use_all_cores() -> None:
    """Makes the CPU as many JAX devices as the process may use cores; call it before anything touches a device.

    Small models train and run faster side by side, one on each core, than one after the other on all cores.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


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
