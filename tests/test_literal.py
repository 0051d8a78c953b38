"""What a user or a model wrote is shown as it is: no markup, no control of the terminal, in every encoding."""

from __future__ import annotations

import html
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import Answer, moesmith
from conversions import arguments

from moesmith import console
from moesmith.cli import main
from moesmith.console import code, inline
from moesmith.evaluation import compare

NAMES = ["[bold red]", "a [b] c", "[link=x]y", "|pipe", "<script>alert(1)<", "Über 中", "$x_1$ :smile:", "`*_&lt;_*`"]


@pytest.fixture(scope="module")
def odd(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on domains with such names, in a folder with such a name."""
    folder = tmp_path_factory.mktemp("odd") / "[bold] :smile: `x` <b>"
    data = folder / "data"
    data.mkdir(parents=True)
    for name in NAMES:
        rng = random.Random(name)
        for split in ("train", "test"):
            texts = [" ".join(rng.choices("one two <b> [x] cat dog".split(), k=40)) for _ in range(20)]
            (data / f"{name}.{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "[m]`<i>|").symlink_to(home / "m")
    names = f"domains.names={json.dumps(NAMES, ensure_ascii=False)}"
    answer = moesmith(*arguments("dive-plus", folder / "[m]`<i>|", data, folder / "run", [names, "stage1.tokens=0"]))
    assert answer.status == 0, answer.err
    (folder / "out").write_text(answer.out)
    return folder


def test_tables_show_names_and_paths(odd: Path) -> None:
    inspected = moesmith("inspect", odd / "run").out
    for text in ((odd / "out").read_text(), inspected):
        assert str(odd / "run") in text.replace("\n", "")
        assert f"{odd}/[m]`<i>|" in text.replace("\n", "")
        experts = re.findall(r"^expert \d +(.*?) *$", text, flags=re.MULTILINE)
        assert sorted(name for line in experts for name in line.split(", ")) == sorted(NAMES)
    evaluated = moesmith("eval", odd / "run", "--tokens", 128)
    assert evaluated.status == 0, evaluated.err
    for name in NAMES:
        assert re.search(rf"^domain {re.escape(name)} +perplexity +[\d.]+ +[\d.]+$", evaluated.out, re.MULTILINE), name


def test_json_holds_them(odd: Path) -> None:
    found = json.loads(moesmith("inspect", odd / "run", "--json").out)
    assert found["run"] == str(odd / "run")
    assert sorted(name for cluster in found["clusters"] for name in cluster) == sorted(NAMES)


def test_the_page_shows_them_and_runs_none(odd: Path) -> None:
    answer = moesmith("report", odd / "run")
    assert answer.status == 0
    assert answer.err.replace("\n", "") == f"written: {odd}/run/report.html"  # and no warning about a font
    page = (odd / "run" / "report.html").read_text(encoding="utf-8")
    cells = [html.unescape(cell).strip() for cell in re.findall(r"<tr><td>(.*?)(?: <span|</td>)", page)]
    assert set(NAMES) <= set(cells)
    assert "alert(1)<" not in re.sub(r"<script>alert\(1\)&lt;", "", page)
    assert page.count("<script") == 2  # the page's own: data and code
    data = re.search(r'<script type="application/json" id="routes">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert sorted(sample["domain"] for sample in json.loads(data[1])["samples"]) == sorted(NAMES)
    for name in NAMES:  # in the figures as well
        assert f">{html.escape(name, quote=False)}<" in page.replace("<!-- ", ""), name


def test_the_card_shows_them(odd: Path) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    text = (odd / "run" / "model" / "README.md").read_text(encoding="utf-8")
    header, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    assert yaml.safe_load(header)["library_name"] == "transformers"
    page = markdown.render(body)
    rows = re.findall(r"<tr>\n<td>(.*?)</td>\n<td.*?>(.*?)</td>\n<td.*?>(.*?)</td>\n</tr>", page)
    assert sorted(html.unescape(name) for name, _, _ in rows[:-1]) == sorted(NAMES)
    assert all(float(value) > 0 for row in rows[:-1] for value in row[1:])
    assert "<h1>[m]`&lt;i&gt;| as a Mixture-of-Experts</h1>" in page
    assert "dense model <code>[m]`&lt;i&gt;|</code>" in page
    recipe = re.search(r'<code class="language-yaml">(.*?)</code>', page, re.DOTALL)
    assert recipe is not None
    assert yaml.safe_load(html.unescape(recipe[1]))["domains"]["names"] == NAMES


@pytest.mark.parametrize(
    "text", [*NAMES, "# a", "\\", "``", "`a", "a`", "~~x~~", "![i](u)", "__b__", "a\nb", "\x1b[31m"]
)
def test_any_text_survives_markdown(text: str) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = text.replace("\n", " ").replace("\x1b", "\\u001b")
    page = markdown.render(f"x {inline(text)} x {code(text)} x")
    assert html.unescape(page) == f"<p>x {shown} x <code>{shown}</code> x</p>\n"
    row = markdown.render(f"| a |\n|---|\n| {inline(text)} |\n")
    assert f"<td>{shown}</td>" in html.unescape(row)


# The terminal -------------------------------------------------------------------------------------------------------

EVIL = "a\x1b]0;title\x07b\x1b[2Jc\rd\x9b31me\u202ef\x00"
HARMLESS = "a\\u001b]0;title\\u0007b\\u001b[2Jc\\u000dd\\u009b31me\\u202ef\\u0000"


def test_control_characters_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.plain(EVIL) == HARMLESS
    assert console.plain("line\n\ttab é 中 🙂 [/x] :smile:") == "line\n\ttab é 中 🙂 [/x] :smile:"
    console.say(EVIL)
    console.show_text(EVIL)
    console.show_table(EVIL, [EVIL, "b"], [(EVIL, 1), ("[/x]", 2)])
    console.show_json({"a": EVIL})
    out, err = capsys.readouterr()
    assert err == HARMLESS + "\n"
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)
    assert out.count(HARMLESS) == 4
    assert json.loads(out[out.index("{") :]) == {"a": EVIL}


def test_a_model_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "continuations", lambda *_: {"MoE": f"{EVIL} [bold]:smile:"})
    assert moesmith("generate", "run", "a").out == f"--- MoE ---\n{HARMLESS} [bold]:smile:\n\n"


def test_an_error_is_shown_as_it_is() -> None:
    answer = moesmith("inspect", "[/x]\x1b[31m:smile:[bold]")
    assert answer.err.startswith("moesmith: [/x]\\u001b[31m:smile:[bold]/run.json is missing.")


class Terminal(io.StringIO):
    """A terminal in memory."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [10, 40, 80])
def test_nothing_is_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    name = "a_rather_long_name_of_a_domain_and_more"
    console.show_table("title", ["domain", "dense", "MoE"], [(name, 123.456, 1234567.8), ("Über 中", 1.0, 2.0)])
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert re.search(rf"^{name} +123.5 +1,234,567.8 *$", text, re.MULTILINE)


def test_progress_on_a_terminal_takes_a_label_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    shown = console.Console(file=terminal, force_terminal=True, width=100, **console._LITERAL)
    monkeypatch.setattr(console, "console", shown)
    with console.meter("moments [/x] [bold]\x1b[2J :smile:", 10) as bar:
        bar.advance(5, "[/y]")
        assert bar.progress is not None
        bar.progress.refresh()
    assert "moments [/x] [bold]\\u001b[2J :smile:" in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "[/y]" in terminal.getvalue()


ENCODINGS = [("ascii", r"\xdc", r"\u4e2d"), ("cp1252", "Ü", r"\u4e2d"), ("utf-8", "Ü", "中")]


@pytest.mark.parametrize(("encoding", "umlaut", "sign"), ENCODINGS)
def test_any_encoding_will_do(
    odd: Path, encoding: str, umlaut: str, sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: str) -> Answer:
        # as Python opens them with such a PYTHONIOENCODING: what the first cannot encode is an error
        streams = {"stdout": "strict", "stderr": "backslashreplace"}
        files = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors) for name, errors in streams.items()}
        for name, file in files.items():
            monkeypatch.setattr(sys, name, file)
        monkeypatch.setattr(sys, "argv", ["moesmith", *words])
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        for file in files.values():
            file.flush()
        assert isinstance(status, int)
        return Answer(status, *(file.buffer.getvalue().decode(encoding) for file in files.values()))

    shown = run("inspect", str(odd / "run"))
    assert shown.status == 0, shown.err
    assert f"{umlaut}ber {sign}" in shown.out
    found = json.loads(run("inspect", str(odd / "run"), "--json").out)
    assert "Über 中" in {name for cluster in found["clusters"] for name in cluster}
    missing = run("inspect", "Über 中")
    assert missing.status == 2
    assert missing.err.startswith(f"moesmith: {umlaut}ber {sign}/run.json is missing.")


@pytest.mark.parametrize(("encoding", "umlaut", "sign"), ENCODINGS)
def test_python_opens_its_streams_like_this(encoding: str, umlaut: str, sign: str) -> None:
    """What the test above takes for granted."""
    code = "import sys; print(*((f.encoding, f.errors) for f in (sys.stdout, sys.stderr)))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=True,
    )
    assert done.stdout.strip() == f"('{encoding}', 'strict') ('{encoding}', 'backslashreplace')"


def test_a_process_in_an_encoding(odd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from moesmith.cli import main; main()", "inspect", str(odd / "run")],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\xdcber \u4e2d" in done.stdout


def test_a_path_that_is_no_utf8_goes_through(home: Path, tmp_path: Path) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    data.symlink_to(home / "d")
    words = arguments("flap-static", home / "m", data, tmp_path / "run")
    assert moesmith(*words).status == 0
    assert json.loads(moesmith("inspect", tmp_path / "run", "--json").out)["inputs"]["data"] == str(data)
    assert moesmith("eval", tmp_path / "run", "--tokens", 128).status == 0  # the run still finds its text
    assert moesmith("report", tmp_path / "run").status == 0
