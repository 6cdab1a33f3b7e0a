"""Where text comes from: named data sets, data sets of the Hub, and local files."""

import difflib
import gc
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

if TYPE_CHECKING:
    import datasets
    import pyarrow

Source: TypeAlias = dict[str, str | int | None]
Tables: TypeAlias = "Generator[tuple[str, pyarrow.Table], None, None]"  # each with where it comes from

GENERATED = "generated"
"""Texts that generate.py wrote; `generated:PATH` for a file or folder other than the one it writes to by default."""

SAMPLE = "sample"
"""The text of this package: 32 kB of prose from its own documentation, for runs that have no other."""

GENERATED_FOLDER, GENERATED_ENDING = "runs/generated", "_gentext.json"


@dataclass(frozen=True)
class Named:
    """A data set with a short name.

    Attributes:
        hub_id: Of the Hub.
        subset: Its configuration; None if it is the suffix of the name, as in `aya:english`.
        column: That holds the text, if it is not plain which.
        part: The suffix of the name.
    """

    hub_id: str
    subset: str | None = None
    column: str | None = None
    part: str | None = None


NAMED_DATASETS: dict[str, Named] = {
    "wikitext": Named("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext2": Named("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "aya": Named("CohereForAI/aya_collection_language_split", column="inputs", part="language"),
    "m2d2": Named("machelreid/m2d2", part="field"),
    "dolma": Named("allenai/dolma", part="language"),
}
"""Short name -> data set. The Hub's m2d2 and dolma are programs, which are never run: they need local copies."""


@dataclass(frozen=True)
class Documents:
    """The text of a data set, joined, and where it came from.

    Attributes:
        text: All documents, joined by the separator.
        source: Plain-data description: dataset, config, split, column, separator.
    """

    text: str
    source: Source

    def prefix(self, chars: int) -> "Documents":
        """Returns the first `chars` characters of the text, with the same source."""
        return replace(self, text=self.text[:chars])


def read_documents(
    dataset: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    separator: str = "\n\n",
    max_chars: int | None = None,
    data_dir: str | None = None,
) -> Documents:
    r"""Returns the text, or its start, of a named data set, of one on the Hub, or of local files.

    Rows are joined by a blank line, as is usual for perplexity on WikiText, whose rows are the lines of the articles. A
    .txt file is one document; a folder's files are taken in the order of their names, without subfolders. A Hub data
    set is read over the network from the files of its split alone; without a network, from the copy, if there is one,
    that `datasets.load_dataset` once prepared in its cache.

    Args:
        dataset: A key of `NAMED_DATASETS`, with its part (`aya:english`) if it has several; `generated`, see
            `GENERATED`; a path to a .txt, .json, .jsonl or .parquet file, or to a folder of such files; or a data set
            id of the Hugging Face Hub. The first that fits is taken.
        subset: The configuration of a Hub data set. None: the named data set's, or the only one.
        split: The split of a Hub data set. None: "test", or the only one.
        text_column: The column that holds the text. None: "text", or the only column of strings.
        separator: The text between two documents.
        max_chars: Nothing is read after the row with which the text has so many characters. None: all is read.
        data_dir: A folder with local copies of named data sets, `NAME` or `NAME/PART`, which go before the Hub's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The data set cannot be read, lacks the split or the text column, or holds no text.

    Source: https://huggingface.co/docs/transformers/perplexity for `"\n\n".join(rows)`.
    """
    place = _local_place(dataset, data_dir)
    if place is not None:
        if subset or split:
            raise ValueError(f"{dataset} is local, it has no subset or split ({subset=}, {split=}): leave both unset")
        tables = _generated_tables(place) if _name(dataset) == GENERATED else _file_tables(place)
    else:
        dataset, subset, text_column = _on_hub(dataset, subset, text_column)
        split, tables = _hub_tables(dataset, subset, split)
    with closing(tables):
        text_column, rows = _read_rows(tables, text_column, max_chars, len(separator))
    text = separator.join(rows)
    if not text.strip():
        rows_and_split = f"{len(rows)} rows" + (f" of split {split}" if split else "")
        raise ValueError(f"{dataset}: it is empty: no text in column {text_column!r} ({rows_and_split}); name another")
    origin = {"dataset": dataset, "config": subset, "split": split}
    return Documents(text, {**origin, "column": text_column, "separator": separator})


def sample_documents() -> Documents:
    """Returns the text of this package, which needs no network."""
    text = resources.files("tracing_jax.data").joinpath("sample.txt").read_text("utf-8")
    source = f"{len(text.encode()) // 1000} kB of the documentation of tracing_jax, a part of the package"
    return Documents(text, {"dataset": SAMPLE, "config": None, "split": None, "column": None, "source": source})


def _name(dataset: str) -> str:
    return dataset.partition(":")[0]


def _local_place(dataset: str, data_dir: str | None) -> Path | None:
    """Returns the local file or folder of a data set; None if it is on the Hub."""
    name, _, part = dataset.partition(":")
    if name == GENERATED:
        return Path(part or GENERATED_FOLDER).expanduser()
    if name not in NAMED_DATASETS:
        return Path(dataset).expanduser() if _is_local(dataset) else None
    copy = Path(data_dir or "").expanduser() / name / part
    return copy if data_dir and copy.exists() else None


def _on_hub(dataset: str, subset: str | None, column: str | None) -> tuple[str, str | None, str | None]:
    """Returns Hub id, configuration and text column.

    Raises:
        ValueError: A named data set without the part that it must have, or with one where it has none.
    """
    name, _, part = dataset.partition(":")
    named = NAMED_DATASETS.get(name)
    if named is None:
        return dataset, subset, column
    if named.part and not (part or subset):
        raise ValueError(f"{name} has a {named.part} each: name one, such as {name}:english, or set the subset")
    if part and not named.part:
        raise ValueError(f"{dataset}: {name} has no parts; leave out {part!r}")
    return named.hub_id, subset or named.subset or part, column or named.column


def _generated_tables(path: Path) -> Tables:
    """Yields prompt and text, as one, of each text in files that generate.py wrote."""
    import pyarrow as pa

    files = sorted(path.glob(f"*{GENERATED_ENDING}")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"{path}: no texts in it; expected *{GENERATED_ENDING}, which generate.py writes, or generated:PATH"
        )
    for file in files:
        try:
            table = _read_json(file)
            whole = [f"{row['prompt']}{row['text']}" for row in table.select(["prompt", "text"]).to_pylist()]
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise ValueError(f"{file}: not a file of generate.py: {error}") from error
        yield str(file), pa.table({"text": whole})


def _is_local(dataset: str) -> bool:
    """Returns whether this is a path: something is there, or no Hub id is spelt so."""
    path = Path(dataset).expanduser()
    return path.exists() or path.suffix in _READERS or dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1


def _read_rows(
    tables: Tables, text_column: str | None, max_chars: int | None, separator_chars: int
) -> tuple[str | None, list[str]]:
    """Returns the text column, the same in all tables, and its rows until they, joined, have `max_chars`."""
    rows: list[str] = []
    chars = -separator_chars
    for where, table in tables:
        text_column, column = _column_of_text(table, text_column, where)
        for row in column:
            rows.append(row)
            chars += separator_chars + len(row)
            if max_chars is not None and chars >= max_chars:
                return text_column, rows
    return text_column, rows


def _file_tables(path: Path) -> Tables:
    """Yields the rows of a file, or of each of a folder's files."""
    import pyarrow as pa

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    paths = [path for path in paths if path.suffix in _READERS]
    if not paths:
        raise ValueError(f"{path}: not a file, or a folder with files, of the kinds {', '.join(_READERS)}")
    for path in paths:
        try:
            table = _READERS[path.suffix](path)
        except (ValueError, pa.ArrowException) as error:  # UTF-8 and JSON errors are ValueErrors
            raise ValueError(f"{path}: cannot be read as {path.suffix}: {error}") from error
        yield str(path), table


def _read_text(path: Path) -> "pyarrow.Table":
    import pyarrow as pa

    # Decoding the bytes keeps the line ends as they are.
    return pa.table({"text": [path.read_bytes().decode("utf-8")]})


def _read_json(path: Path) -> "pyarrow.Table":
    import pyarrow as pa

    text = path.read_text(encoding="utf-8")
    # Not splitlines: JSON strings may hold other line separators, such as U+2028, as they are.
    lines = (line for line in text.split("\n") if line.strip())
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, or one object a line")
    return pa.Table.from_struct_array(pa.array(rows))


def _read_parquet(path: Path) -> "pyarrow.Table":
    from pyarrow import parquet

    return parquet.read_table(path)


_READERS: dict[str, Callable[[Path], "pyarrow.Table"]] = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def _hub_tables(dataset: str, subset: str | None, split: str | None) -> tuple[str, Tables]:
    """Returns the split and its rows, which are read as they are asked for; no file of another split is opened."""
    with _hub_errors(dataset, subset):
        builder = _hub_builder(dataset, subset)
    files = builder.config.data_files  # by split; None for a prepared copy
    splits = [str(name) for name in files or builder.info.splits or ()]
    split = split or ("test" if "test" in splits else splits[0] if len(splits) == 1 else None)
    if split is None or split not in splits:
        raise ValueError(f"{dataset}: no split {split or 'was chosen'}: choose one of {', '.join(splits)}")
    if files:  # datasets would open the first file of the first split to learn the columns
        builder.config.data_files = {split: files[split]}
    return split, _stream(builder, dataset, subset, split)


def _stream(builder: "datasets.DatasetBuilder", dataset: str, subset: str | None, split: str) -> Tables:
    """Yields one row at a time: a longer table would be filled from the split's next file."""
    with _hub_errors(dataset, subset):
        try:
            for table in builder.as_streaming_dataset(split=split).with_format("arrow").iter(batch_size=1):
                yield dataset, table
        finally:  # a Parquet scan that was not read to its end, if it outlives Python's modules, aborts the process
            gc.collect()


def _hub_builder(dataset: str, subset: str | None) -> "datasets.DatasetBuilder":
    """Returns the builder of a Hub data set or, if the Hub is out of reach, of its newest prepared copy."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        # Any answer will do. Asked first because datasets would try for half a minute before it turns to its cache.
        get_session().head(constants.ENDPOINT, timeout=10)
    except (HTTPError, OfflineModeIsEnabled) as error:
        name, copy = dataset.rpartition("/")[2], {"version": "auto", "hash": "auto"}
        try:
            return Cache(repo_id=dataset, dataset_name=name, config_name=subset, **copy)
        except ValueError as missing:
            raise ConnectionError(f"{constants.ENDPOINT} is out of reach ({type(error).__name__}). {missing}") from None
    return datasets.load_dataset_builder(dataset, subset)


@contextmanager
def _hub_errors(dataset: str, subset: str | None) -> Iterator[None]:
    """Turns every error inside into a ValueError with a remedy."""
    try:
        yield
    except Exception as error:  # the Hub's, the network's and the files' errors have no common class
        # Requests, whose addresses may be signed, are not quoted.
        reason = type(error).__name__ if isinstance(error, HTTPError) else error
        close = [] if "/" in dataset else difflib.get_close_matches(dataset, list(NAMED_DATASETS), n=1)
        if close:  # an id of the Hub with its owner is no slip of a name
            raise ValueError(
                f"there is no file and no named data set {dataset!r}. Did you mean {close[0]}? "
                f"(Named are {', '.join(NAMED_DATASETS)}; from the Hub: {' '.join(str(reason).split())})"
            ) from None
        raise ValueError(
            f"cannot read the Hub data set {dataset!r} ({subset=}): {reason}\nExpected a path, a Hub id or one of "
            f"{', '.join(NAMED_DATASETS)}. Without a network, give a local text file (--dataset FILE), take the "
            f"text of this package (--dataset {SAMPLE}), or copy the "
            f"cache of datasets from a machine where datasets.load_dataset({dataset!r}, {subset!r}) has run"
        ) from None


def _column_of_text(table: "pyarrow.Table", wanted: str | None, where: str) -> tuple[str, list[str]]:
    """Returns the name and the rows, without nulls, of the wanted, the "text", or the only column of strings."""
    import pyarrow as pa

    strings = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    column = wanted or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if column is None or column not in strings:
        columns = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise ValueError(f"{where}: text column {wanted or '(not given)'} not found: choose a string one of {columns}")
    return column, table.column(column).drop_null().to_pylist()
