"""Read files of records: JSON lines, plain or compressed with gzip, a JSON list, Parquet."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, overload

from moesmith.data.records import Record, as_text, fields
from moesmith.errors import MoesmithError
from moesmith.files.parse import parse_json

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
ROWS = 256  # of a Parquet file that are unpacked at once
MARK = b"\xef\xbb\xbf"  # a byte-order mark
LARGE = 2**26  # bytes of a file of JSON lines whose records stay on disk
DENSEST = 200  # times its packed size, beyond LARGE: text does not unpack to more


class Lines(Sequence[Record]):
    """Records of a large file of JSON lines, checked once, and read again whenever they are asked for.

    Args:
        path: the file.
        places: where each record begins and ends, one after the other.
    """

    def __init__(self, path: Path, places: array[int]) -> None:
        self.path, self.places = path, places
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return len(self.places) // 2

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self.places[2 * (index % len(self)) : 2 * (index % len(self)) + 2]
        self.file.seek(start)
        found: Record = _json(self.file.read(end - start))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Lines, (self.path, self.places)


def read_records(path: Path) -> Sequence[Record]:
    """Read a file of records in the format that its name's ending says, one of ``FORMATS``.

    Raises:
        MoesmithError: the file cannot be read or holds no record, or something in it is not a record (file and line,
            or row, are named); or it is a Parquet file and ``pyarrow`` is not installed.
    """
    if path.name.endswith(".parquet"):
        return _checked(path, _parquet_rows(path), "row")
    if path.name.endswith(".json"):
        return _checked(path, _list(path), "item")
    return read_jsonl(path)


def read_jsonl(path: str | Path) -> Sequence[Record]:
    """Read a file of JSON lines, one record per line; blank lines are skipped. ``.gz`` is unpacked.

    Of a file larger than :data:`LARGE` every line is checked now, and read when it is asked for.

    Raises:
        MoesmithError: the file cannot be read or holds no record, or a line is not a record; file and line are named.
    """
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file() and path.stat().st_size > LARGE:
        return _on_disk(path)
    return _checked(path, enumerate(_bytes(path).split(b"\n"), start=1))


def _on_disk(path: Path) -> Lines:
    places, start, end = array("q"), 0, 0

    def lines() -> Iterator[tuple[int, bytes]]:
        nonlocal start, end
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                start, end = end, end + len(line)
                if number == 1 and line.startswith(MARK):
                    start += len(MARK)
                yield number, line.removeprefix(MARK) if number == 1 else line

    for _ in _records(path, lines()):
        places.extend((start, end))
    return Lines(path, places)


def find_records(folder: Path, name: str) -> list[Path]:
    """Find the files of records called ``name`` in a folder, in any format."""
    return [path for path in (folder / f"{name}{ending}" for ending in FORMATS) if path.is_file()]


def records_file(folder: Path, name: str) -> Path:
    """Return the file of records called ``name`` in a folder; if there is none, the name that it has as JSON lines.

    Raises:
        MoesmithError: there are two, in different formats.
    """
    files = find_records(folder, name)
    if len(files) > 1:
        what = f"{folder} holds {name} twice, as {' and as '.join(file.name for file in files)}"
        raise MoesmithError(what, "Leave one of them there.")
    return files[0] if files else folder / f"{name}.jsonl"


def _checked(path: Path, items: Iterator[tuple[int, Any]], unit: str = "") -> list[Record]:
    return list(_records(path, items, unit))


def _records(path: Path, items: Iterator[tuple[int, Any]], unit: str = "") -> Iterator[Record]:
    """Check that every item is a record; ``unit`` is what an item is called where it is not a line."""
    found = False
    for number, item in items:
        if isinstance(item, bytes) and not item.strip():
            continue
        try:
            record = _json(item) if isinstance(item, bytes) else item
            if not isinstance(record, dict):
                raise ValueError(f"the {unit or 'line'} must be a JSON object, not {type(record).__name__}")
            as_text(record), fields(record)  # raises where something is wrong with it
        except ValueError as error:
            where = f"{path}, {unit} {number}" if unit else f"{path}:{number}"
            raise MoesmithError(f"{where}: {error}", f"Fix or remove the {unit or 'line'}.") from error
        found = True
        yield record
    if not found:
        raise MoesmithError(f"{path} is empty", "It needs one JSON object per line.")


def _json(text: bytes) -> Any:
    try:
        return parse_json(text)
    except UnicodeDecodeError as error:
        raise ValueError("the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg} at column {error.colno})") from error


def _list(path: Path) -> Iterator[tuple[int, Any]]:
    """Read the items of a JSON list, counted from 1."""
    try:
        found = parse_json(_bytes(path))
    except ValueError as error:
        cure = "Fix it; a file with one object per line is called .jsonl."
        raise MoesmithError(f"{path} is not JSON ({error})", cure) from error
    if not isinstance(found, list):
        raise MoesmithError(f"{path} must hold a list of JSON objects, not {type(found).__name__}", "Fix the file.")
    return iter(enumerate(found, start=1))


def _bytes(path: Path) -> bytes:
    """Read a file's bytes, unpacked, without a byte-order mark."""
    try:
        data = path.read_bytes()
        data = _unpacked(path, data) if path.name.endswith(".gz") else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MoesmithError(f"{path} is not a whole gzip file ({error})", "Fetch or pack it again.") from error
    except OSError as error:
        raise MoesmithError(f"{path} cannot be read: {error.strerror or error}", "Put the file there.") from error
    return data.removeprefix(MARK)


def _unpacked(path: Path, data: bytes) -> bytes:
    most = max(LARGE, DENSEST * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(most + 1)
    return found if len(found) <= most else _refuse_dense(path)


def _refuse_dense(path: Path) -> NoReturn:
    what = f"{path} unpacks to more than {DENSEST} times its size, which text does not"
    raise MoesmithError(what, "Fetch or write it again; unpack it yourself if it is meant so.")


def _weight(value: Any) -> int:
    """Count the characters and other values in what a file unpacks to."""
    if isinstance(value, str | bytes):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_weight, inner))


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Read the rows of a Parquet file, counted from 1; the field of a missing value is left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        what = f"{path} is a Parquet file, read with the package pyarrow"
        raise MoesmithError(what, "Run: pip install 'moesmith[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            most, batches = max(LARGE, DENSEST * path.stat().st_size), []
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            if sum(group.total_byte_size for group in groups) > most:
                _refuse_dense(path)
            for batch in file.iter_batches(ROWS):
                batches.append(batch.to_pylist())
                most -= _weight(batches[-1])
                if most < 0:
                    _refuse_dense(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise MoesmithError(f"{path} cannot be read as Parquet: {reason}", "Fetch or write it again.") from error
    rows = (row for batch in batches for row in batch)
    return enumerate(({key: value for key, value in row.items() if value is not None} for row in rows), start=1)
