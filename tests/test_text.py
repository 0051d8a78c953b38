"""Reading: records, JSON lines, folders of sets, and YAML descriptions of Hugging Face data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesmith.data import hf_datasets as hub
from moesmith.data.text import Record, as_text, fields, kind, load_domains, read_jsonl, source_digest
from moesmith.errors import MoesmithError

DATASETS = Path(__file__).parent.parent / "src" / "moesmith" / "data" / "sets"

RECORDS: list[tuple[str, Record, str]] = [
    ("text", {"id": "1", "text": " as it is \n", "summary": "s"}, " as it is \n"),
    ("cloze", {"context": "He opened the", "target": "door"}, "He opened the door"),
    (
        "multiple_choice",
        {"context": "Rain fell.", "question": "Was it wet?", "choices": ["no", "yes"], "answer": 1},
        "Rain fell.\nWas it wet?\nyes",
    ),
    ("multiple_choice", {"question": "She then", "choices": ["ran", "sat"], "answer": 0}, "She then ran"),
    ("multiple_choice", {"question": "The _ is red.", "choices": ["sky", "car"], "answer": 1}, "The car is red."),
    ("multiple_choice", {"question": "Cut it", "choices": ["x", "y"], "answer": None}, "Cut it\nx\ny"),
    (
        "multiple_choice",
        {"question": "1+1?", "choices": ["2", "3"], "answer": 0, "rationale": "Count."},
        "1+1?\nCount.\n2",
    ),
    (
        "partial_context_choice",
        {
            "context_options": ["Ann saw Bob because Ann", "Ann saw Bob because Bob"],
            "continuation": "waved.",
            "answer": 1,
        },
        "Ann saw Bob because Bob waved.",
    ),
    ("pair", {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}, "It rains.\nIt is wet."),
    ("code", {"prompt": "def f():\n", "solution": "    return 1\n", "test": "t"}, "def f():\n    return 1\n"),
    ("code", {"prompt": "Write f.", "solution": "f = 1"}, "Write f.\nf = 1"),
    ("instruction", {"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2\n3"),
    ("instruction", {"instruction": "Sing.", "input": "", "output": "La"}, "Sing.\nLa"),
    ("prompt", {"prompt": "Hi", "response": "Hello"}, "Hi\nHello"),
    ("chat", {"turns": ["One?", "Two?"], "category": "x"}, "One?\nTwo?"),
    ("question", {"question": "Who?", "answer": "Me", "aliases": ["I"]}, "Who?\nMe"),
    ("question", {"context": "A box.", "question": "What?", "answer": "box"}, "A box.\nWhat?\nbox"),
    ("question", {"question": "2+2?", "solution": "2+2 is 4.", "answer": 4}, "2+2?\n2+2 is 4."),
    ("question", {"question": "2+2?", "equation": "2+2", "answer": "4"}, "2+2?\n2+2\n4"),
    ("messages", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}, "Hi\nYo"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        "a\nb",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "a\n",
    ),
    ("conversations", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, "Hi\nYo"),
    ("text", {"text": "t", "messages": "whatever", "score": float("nan")}, "t"),
]


@pytest.mark.parametrize(("name", "record", "text"), RECORDS)
def test_each_kind_reads_as_natural_text(name: str, record: Record, text: str) -> None:
    assert kind(record) == name
    assert as_text(record) == text


def test_two_field_records_have_two_fields_and_others_are_whole() -> None:
    assert fields({"premise": "a", "hypothesis": "b"}) == ["a", "b"]
    assert fields({"question": "Who?", "answer": "Me"}) == ["Who?\nMe"]
    assert fields({"text": "x\ny", "fields": ["x", "y"]}) == ["x", "y"]
    for other in ([], [1, 2], ["x", float("nan")], "xy"):  # a field of that name that is not ours
        assert fields({"text": "x", "fields": other}) == ["x"]


def test_chats_of_both_shapes_are_the_same_messages() -> None:
    shared = [("system", "s"), ("human", "h"), ("gpt", "g"), ("function_response", "t")]
    record = {"conversations": [{"from": who, "value": text} for who, text in shared]}
    roles = [("system", "s"), ("user", "h"), ("assistant", "g"), ("tool", "t")]
    chat = [{"role": role, "content": text} for role, text in roles]
    assert fields(record) == fields({"messages": chat}) == [chat]
    named = {"conversations": [{"role": role, "content": text} for role, text in roles]}  # both shapes go by this name
    assert fields(named) == [chat]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[1, 2]", "JSON object, not list"),
        (b"null", "JSON object, not NoneType"),
        (b'{"txt": "a"}', "no known kind of record has the fields txt"),
        (b"{}", "fields none"),
        (b'{"text": 1.5e3, "x": NaN}\xff', "not UTF-8"),
        (b'{"text": {"a": 1}}', "'text' must be text"),
        (b'{"text": "  "}', "holds no text"),
        (b'{"text": NaN}', "'text' must be text, not nan"),
        (b'{"text": -Infinity}', "'text' must be text, not -inf"),
        (b'{"text": 5}', "'text' must be text, not 5"),
        (b'{"text": true}', "'text' must be text, not True"),
        (b'{"text": null}', "holds no text"),
        (b'{"text": ["a", NaN]}', "'text' must be a list of texts"),
        (b'{"question": "q", "answer": NaN}', "'answer' must be text, not nan"),
        (b'{"question": "q", "answer": 1e999}', "'answer' must be text, not inf"),
        (b'{"question": 3, "answer": "a"}', "'question' must be text, not 3"),
        (b'{"premise": "p", "hypothesis": NaN}', "'hypothesis' must be text, not nan"),
        (b'{"messages": []}', "'messages' must be a list of messages"),
        (b'{"messages": "hi"}', "'messages' must be a list of messages"),
        (b'{"messages": [{"content": "hi"}]}', "has no 'role'"),
        (b'{"messages": [{"role": "user"}]}', "has no 'content'"),
        (b'{"messages": [{"role": "user", "content": NaN}]}', "content of a message of 'messages' must be text"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}', "must be text, not [{'type'"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "holds no text"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "surrogate"),
        (b'{"conversations": [{"from": "me", "value": "x"}]}', "is from 'me', not one of user, human, assistant"),
        (b'{"conversations": [{"from": [], "value": "x"}]}', "is from [], not one of user"),
        (b'{"conversations": [{"from": "human", "value": 3}]}', "content of a message of 'conversations' must be text"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"question": "q", "choices": "ab", "answer": 0}', "'choices' must be a list of texts"),
        (b'{"question": "q", "choices": ["a"], "answer": 1}', "index of one of 1 choices, not 1"),
        (b'{"question": "q", "choices": ["a"], "answer": "a"}', "index of one of 1 choices, not 'a'"),
        (b'{"text": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, ""),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(MoesmithError) as refused:
        read_jsonl(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert why in str(refused.value)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(MoesmithError, match=r"empty\.jsonl is empty"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(MoesmithError, match=r"none\.jsonl cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")


def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n{"text": "c"}'.encode())
    assert [as_text(record) for record in read_jsonl(path)] == ["a\u2028b", "c"]


once = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


@once
@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=8), ascii_only=st.booleans())
def test_what_was_written_is_read(tmp_path: Path, texts: list[str], ascii_only: bool) -> None:
    path = tmp_path / "round.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert [record["text"] for record in read_jsonl(path)] == texts


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
near_messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), json_values | st.just("user"))
)
near_records = st.dictionaries(
    st.sampled_from(["text", "question", "choices", "answer", "context", "target", "prompt", "solution", "turns"]),
    json_values,
) | st.dictionaries(st.sampled_from(["messages", "conversations", "fields"]), near_messages | json_values)


@once
@given(content=st.binary() | near_records.map(lambda record: json.dumps(record).encode()))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    refusal = ""
    try:
        records = read_jsonl(path)
    except MoesmithError as error:
        refusal = str(error)
    if refusal:
        assert str(path) in refusal
        assert "\n" not in refusal
    else:
        assert records
        assert all(as_text(record).strip() and fields(record) for record in records)


# Folders ------------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, split: str, *texts: str) -> None:
    (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("zebra", "apple", "mango"):
        write(tmp_path, name, "train", f"{name} one", f"{name} two")
        write(tmp_path, name, "test", f"{name} three")
    write(tmp_path, "lonely", "test", "only a test")
    return tmp_path


def test_a_folder_gives_its_complete_sets_by_name(folder: Path) -> None:
    domains = load_domains(str(folder))
    assert [domain.name for domain in domains] == ["apple", "mango", "zebra"]
    assert [record["text"] for record in domains[0].calibration] == ["apple one", "apple two"]
    assert [record["text"] for record in domains[0].evaluation] == ["apple three"]
    assert domains[0].group == ""


def test_names_select_and_order(folder: Path) -> None:
    assert [domain.name for domain in load_domains(str(folder), ["zebra", "apple"])] == ["zebra", "apple"]


def test_groups_come_from_the_index_and_nothing_depends_on_it(folder: Path) -> None:
    index = folder / "index.json"
    index.write_text(json.dumps([{"set": "apple", "domain": "fruit", "split": "train"}]))
    assert [domain.group for domain in load_domains(str(folder))] == ["fruit", "", ""]
    for broken in ("{", "[1]", '{"a": 1}', '[{"set": []}]'):
        index.write_text(broken)
        assert [domain.group for domain in load_domains(str(folder))] == ["", "", ""]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["appel"], "has no domain 'appel'. Did you mean 'apple'?"),
        (["xyz"], "has no domain 'xyz'. It has apple, lonely, mango, zebra."),
        (["lonely"], "'lonely' has no calibration split"),
        (["apple", "mango", "apple"], "'apple' is named twice"),
        ([], "no domains are named"),
    ],
)
def test_wrong_names_are_refused_with_the_cure(folder: Path, names: list[str], message: str) -> None:
    for load in (load_domains, source_digest):
        with pytest.raises(MoesmithError) as refused:
            load(str(folder), names)  # type: ignore[operator]
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bultin", "does not exist. Did you mean 'builtin'?"),
        ("paper42", "Did you mean 'paper24'?"),
        ("nowhere/at/all", "Give a folder, a .yaml file, builtin or paper24."),
        ("", "data is empty. Give text"),
        (" ", "no data source is named. Give a folder"),
        (__file__, "is neither a folder nor a .yaml file"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source: str, message: str) -> None:
    with pytest.raises(MoesmithError) as refused:
        load_domains(source)
    assert message in str(refused.value)


def test_a_folder_without_a_complete_set_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "lonely", "train", "text")
    with pytest.raises(MoesmithError, match="holds no domain"):
        load_domains(str(tmp_path))


def test_the_digest_notices_changed_text_only(folder: Path) -> None:
    before, of_apple = source_digest(str(folder)), source_digest(str(folder), ["apple"])
    assert source_digest(str(folder)) == before
    (folder / "notes.txt").write_text("not data")
    assert source_digest(str(folder)) == before
    write(folder, "mango", "test", "changed")
    assert source_digest(str(folder)) != before
    assert source_digest(str(folder), ["apple"]) == of_apple


# Hugging Face data sets ---------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A YAML file whose data sets are local files, read by the real library."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = [{"a": f"first {i}", "b": f"second {i}", "c": i} for i in range(30)] + [{"a": "lone", "b": None, "c": 1}]
    others = {"d": {"x": 1}, "m": [{"role": "user", "content": "Hi"}], "s": [{"from": "gpt", "value": "Yo"}]}
    rows = [row | others for row in rows]
    for split in ("train", "held"):
        (tmp_path / f"{split}.json").write_text("\n".join(json.dumps({**row, "a": split + row["a"]}) for row in rows))
    files = {split: str(tmp_path / f"{split}.json") for split in ("train", "held")}
    common = {"hub": "json", "data_files": files, "eval_split": "held"}
    path = tmp_path / "sets.yaml"
    content: dict[str, Any] = {
        "two": {**common, "fields": ["a", "b"], "mode": "concat", "group": "g"},
        "laid": {**common, "template": "Q: {a}\nA: {c}"},
        "few": {**common, "fields": ["a"], "rows": 5},
        "arriving": {**common, "fields": ["a"], "rows": 5, "streaming": True},
        "all arriving": {**common, "fields": ["a", "b"], "streaming": True},
        "wrong": {**common, "fields": ["z"]},
        "wrong and arriving": {**common, "fields": ["z"], "streaming": True},
        "unsplit": {**common, "fields": ["a"], "eval_split": "validation"},
        "object": {**common, "fields": ["d"]},
        "talk": {**common, "fields": ["m"]},
        "shared": {**common, "fields": ["s"]},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_data_sets_load_as_described(described: Path) -> None:
    two, laid, few = load_domains(str(described), ["two", "laid", "few"])
    assert (two.mode, two.group, len(two.calibration), len(two.evaluation)) == (
        "concat",
        "g",
        30,
        30,
    )  # lone b is empty
    assert fields(two.calibration[3]) == ["trainfirst 3", "second 3"]
    assert as_text(two.calibration[3]) == "trainfirst 3\nsecond 3"
    assert as_text(laid.evaluation[2]) == "Q: heldfirst 2\nA: 2"
    assert fields(laid.evaluation[2]) == [as_text(laid.evaluation[2])]
    assert len(few.calibration) == 5
    assert few.calibration == load_domains(str(described), ["few"])[0].calibration


def test_rows_are_read_as_they_arrive(described: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, few, every = load_domains(str(described), ["two", "arriving", "all arriving"])
    assert sorted(map(as_text, every.calibration)) == sorted(map(as_text, whole.calibration))
    assert len(few.calibration) == 5
    assert {as_text(r) for r in few.calibration} <= {
        "trainlone",
        *(as_text(r).split("\n")[0] for r in every.calibration),
    }
    assert few.calibration == load_domains(str(described), ["arriving"])[0].calibration
    datasets = pytest.importorskip("datasets")

    def broken(_self: Any) -> Any:
        yield {"a": "a"}
        raise ConnectionError("the connection is gone")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    with pytest.raises(MoesmithError, match=r"cannot be read on: the connection is gone\. Check the connection"):
        load_domains(str(described), ["arriving"])


def test_a_column_of_messages_is_read_as_chats(described: Path) -> None:
    talk, shared = load_domains(str(described), ["talk", "shared"])
    assert fields(talk.calibration[0]) == [[{"role": "user", "content": "Hi"}]]
    assert fields(shared.evaluation[0]) == [[{"role": "assistant", "content": "Yo"}]]


@pytest.mark.parametrize(("value", "text"), [(None, ""), (float("nan"), ""), (3, "3"), (["a", None, 2.5], "a\n\n2.5")])
def test_a_cell_that_is_missing_is_no_text(value: Any, text: str) -> None:
    assert hub._cell(value, "c") == text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "has no column 'z'. Its columns are a, b, c"),
        ("wrong and arriving", "has no column 'z'. Its columns are a, b, c"),
        ("unsplit", "split validation, cannot be loaded"),
        ("object", "column 'd' must hold text, not {'x': 1}. Name columns of text."),
    ],
)
def test_data_sets_unlike_their_description_are_refused(described: Path, name: str, message: str) -> None:
    with pytest.raises(MoesmithError) as refused:
        load_domains(str(described), [name])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", ":1: not YAML"),
        ("", "describes no domains"),
        ("- a", "describes no domains"),
        ("a: {hub: x, eval_split: y, feilds: [t]}", "a.feilds: Extra inputs are not permitted. Did you mean 'fields'?"),
        ("a: {hub: x, fields: [t]}", "a.eval_split: Field required"),
        ("a: {hub: x, eval_split: y}", "a names neither fields nor a template"),
        ("a: {hub: x, eval_split: y, fields: [t], mode: short}", "a.mode"),
        ("a: 3", "a: Input should be"),
        ("a/b: {hub: x, eval_split: y, fields: [t]}", "domain called 'a/b', which begins with a dot, holds a slash"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text(content)
    for load in (load_domains, source_digest):
        with pytest.raises(MoesmithError) as refused:
            load(str(path))  # type: ignore[operator]
        assert str(path) in str(refused.value)
        assert message in str(refused.value)


def test_the_papers_sets_are_those_of_its_clusters() -> None:
    sets = yaml.safe_load((DATASETS / "paper24.yaml").read_text())
    clusters = yaml.safe_load((DATASETS / "clusters.yaml").read_text())
    assert len(sets) == 24
    for groups in clusters.values():
        assert sorted(name for group in groups for name in group) == sorted(sets)
    assert source_digest("paper24") == source_digest(str(DATASETS / "paper24.yaml"))
    assert source_digest("paper24") != source_digest("paper24", ["race"])
    assert {entry["mode"] for entry in sets.values()} == {"long", "concat"}
