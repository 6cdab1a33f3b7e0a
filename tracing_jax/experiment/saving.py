"""The files of a run: of one pair, and of several pairs against one base."""

import io
import pickle
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from tracing_jax import report
from tracing_jax.alignment import Alignment
from tracing_jax.record import RECORD_FORMAT, RunFiles, atomic_write, legacy_dict, write_json, write_pickle


def save_run(
    record: dict[str, Any],
    files: RunFiles,
    alignment: Alignment | None = None,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Writes the files of one run, each whole or not at all; the JSON, written last, marks that all are there."""
    write_pickle(files.pickle, record)
    (files.folder / "alignment.npz").unlink(missing_ok=True)  # of an earlier run
    if alignment is not None:
        files.folder.mkdir(exist_ok=True)
        atomic_write(files.folder / "alignment.npz", _npz(alignment.arrays))
    for name, found in (arrays or {}).items():
        files.folder.mkdir(exist_ok=True)
        atomic_write(files.folder / f"{name}.npz", _npz(found))
    images = report.images_of_run(record)
    atomic_write(files.png, images.whole)
    atomic_write(files.html, report.html(record, images).encode())
    write_json(files.json, record)
    logging.info("wrote %s and, beside it, json, png and html", files.pickle)


def save_pairs(records: Mapping[str, dict[str, Any]], files: RunFiles) -> None:
    """Writes the files of several pairs together; those of each pair are in the folder of the run already."""
    write_json(files.json, {"format": RECORD_FORMAT, "records": list(records.values())})
    atomic_write(
        files.pickle, pickle.dumps({name: legacy_dict(record) for name, record in records.items()}, protocol=4)
    )
    report.save_png(report.figure_of_pairs(list(records.values())), files.png)
    pages = [urllib.parse.quote(f"{files.folder.name}/{name}.html") for name in records]
    atomic_write(files.html, report.pairs_html(list(records.values()), pages).encode())
    logging.info("wrote %s, json, png and html; each pair is in %s", files.pickle, files.folder)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
