"""Load domains from Hugging Face data sets that a YAML file describes.

One entry per domain::

    race: {hub: ehovy/race, config: all, split: train, eval_split: validation, fields: [article], mode: long}

DIVE's sampler draws one of the columns in ``fields``; ``template`` lays a row out as the text that perplexity and
training see ("{question}\\n{answer}"; without it: the fields, one per line). A single field whose cells are lists of
messages is read as chats. Loading goes through ``datasets``, which reads data files and runs no code of a data set.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moesmith.data.records import Domain, Mode, Record, as_text, check_names, choose
from moesmith.errors import MoesmithError, first_fault
from moesmith.files.parse import parse_yaml

BUFFER = 10_000  # rows of a stream among which the next one is drawn, after its files have been shuffled


class HubSet(BaseModel):
    """Where the records of one domain come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub: str  # hub id, a local folder, or a format name ("json", "parquet") with data_files
    config: str | None = None
    revision: str | None = None  # a commit or branch; fixes the data
    data_files: dict[str, str | list[str]] | None = None  # split → files in the repository
    split: str = "train"
    eval_split: str
    fields: list[str] = []
    template: str = ""
    mode: Mode = ""
    group: str = ""
    rows: int = 20000  # at most this many rows of a split, drawn at random with a fixed seed
    streaming: bool = False  # read rows as they arrive, and no more of the set than they take


def hub_domains(path: Path, names: Sequence[str] | None = None) -> list[Domain]:
    """Load the domains a YAML file describes, sorted by name, or those named in their order.

    Raises:
        MoesmithError: the file is not what this module reads (file and key are named), a name is unknown, ``datasets``
            is not installed, or a data set cannot be loaded or lacks a split or column.
    """
    sets = read_sets(path)
    return [_load(name, sets[name], path) for name in choose(sorted(sets), names, str(path))]


def read_sets(path: Path) -> dict[str, HubSet]:
    """Read the descriptions in a YAML file."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        raise MoesmithError(f"{path} cannot be read: {error}", "Give a YAML file in UTF-8.") from error
    if not isinstance(content, dict) or not content:
        raise MoesmithError(f"{path} describes no domains", "It needs lines like 'name: {hub: ..., eval_split: ...}'.")
    sets = {}
    for name, entry in content.items():
        try:
            sets[str(name)] = HubSet.model_validate(entry)
        except ValidationError as error:
            key, what = first_fault(error)
            where = f"{name}.{key}" if key else name
            raise MoesmithError(f"{path}: {where}: {what}", _nearest_key(error.errors()[0])) from error
        if not sets[str(name)].fields and not sets[str(name)].template:
            raise MoesmithError(f"{path}: {name} names neither fields nor a template", "Say which columns are text.")
    check_names(list(sets), str(path))
    return sets


def _nearest_key(problem: Any) -> str:
    if problem["type"] != "extra_forbidden":
        return ""
    near = difflib.get_close_matches(str(problem["loc"][-1]), HubSet.model_fields, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(HubSet.model_fields)}."


def _load(name: str, entry: HubSet, path: Path) -> Domain:
    calibration = _records(name, entry, entry.split, path)
    evaluation = _records(name, entry, entry.eval_split, path)
    return Domain(name, calibration, evaluation, entry.group, entry.mode)


def _records(name: str, entry: HubSet, split: str, path: Path) -> tuple[Record, ...]:
    try:
        import datasets
    except ImportError as error:
        raise MoesmithError("Hugging Face data sets need an extra", "Run: pip install 'moesmith[data]'") from error
    try:
        data = datasets.load_dataset(
            entry.hub,
            entry.config,
            data_files=entry.data_files,
            split=split,
            revision=entry.revision,
            streaming=entry.streaming,
        )
        known = data.column_names or list(next(iter(data), {}))  # a stream may know them from its rows only
    except Exception as error:  # the library raises its own errors, the hub's and the network's
        reason = str(error).partition("\n")[0]
        raise MoesmithError(
            f"{path}: {name}: data set {entry.hub}, split {split}, cannot be loaded: {reason}",
            "Check the connection, the id and the split, or leave the domain out.",
        ) from error
    columns = list(dict.fromkeys([*entry.fields, *re.findall(r"\{(\w+)\}", entry.template)]))
    for column in columns:
        if column not in known:
            raise MoesmithError(
                f"{path}: {name}: data set {entry.hub} has no column '{column}'",
                f"Its columns are {', '.join(known)}.",
            )
    data = data.select_columns(columns)
    if entry.streaming:
        data = data.shuffle(seed=0, buffer_size=BUFFER).take(entry.rows)
    elif len(data) > entry.rows:
        data = data.shuffle(seed=0).select(range(entry.rows))
    try:
        records = tuple(record for row in data if (record := _record(row, entry)))
    except OSError as error:  # the connection of a stream
        what = f"{path}: {name}: split {split} of {entry.hub} cannot be read on: {str(error).partition(chr(10))[0]}"
        raise MoesmithError(what, "Check the connection, or leave streaming out.") from error
    except ValueError as error:
        raise MoesmithError(
            f"{path}: {name}: split {split} of {entry.hub}: {error}", "Name columns of text."
        ) from error
    if not records:
        raise MoesmithError(f"{path}: {name}: split {split} of {entry.hub} holds no text", "Check its fields.")
    return records


def _record(row: dict[str, Any], entry: HubSet) -> Record | None:
    """Turn a row into a record; ``None`` where a field is empty, as in the unanswered rows many sets have.

    Raises:
        ValueError: a cell is not text.
    """
    if len(entry.fields) == 1 and not entry.template and _is_chat(messages := row[entry.fields[0]]):
        record = {"conversations" if "from" in messages[0] else "messages": messages}
        return record if as_text(record) else None
    texts = {column: _cell(value, column) for column, value in row.items()}
    parts = [texts[column] for column in entry.fields]
    template = entry.template or "\n".join(f"{{{column}}}" for column in entry.fields)
    whole = re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], template)
    if not whole.strip() or not all(part.strip() for part in parts):
        return None
    return {"text": whole, "fields": parts or [whole]}


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def _cell(value: Any, column: str) -> str:
    """Turn a cell into text; NaN is a missing value.

    Raises:
        ValueError: it is neither text nor a number nor a list of such.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list):
        return "\n".join(_cell(item, column) for item in value)
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"column '{column}' must hold text, not {value!r:.40}")
