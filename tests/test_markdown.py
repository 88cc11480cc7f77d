"""Markdown as it streams: what stands on the terminal in the end, whatever was drawn on the way."""

from __future__ import annotations

import io
import re

import pytest

from engine.chat.markdown import MarkdownStream, split_blocks

ANSWER = """\
# Sums

A *sum* is `a + b`, no <b>tag</b>.
Second line

- one
- two

```python
def add(a, b):

    return a + b
```

| x | y |
|---|---|
| 1 | 2 |

Done.
"""


def screen(output: str) -> list[str]:
    """The lines that a terminal ends up with; it knows the few sequences that rich uses here."""
    lines, row, column = [""], 0, 0
    for text, code in re.findall(r"([^\x1b]+)|\x1b\[([0-9;?]*[A-Za-z])", output):
        for char in text:
            if char == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif char == "\r":
                column = 0
            else:
                lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
                column += 1
        if code.endswith("A"):
            row -= int(code[:-1] or 1)
            assert row >= 0, "went above what it had drawn"
        elif code == "2K":
            lines[row] = ""
        elif code:
            assert code.endswith("m") or code in ("?25l", "?25h"), code
    assert not any(lines[row + 1 :])  # the cursor is below all there is
    return [line.rstrip() for line in lines[: row + 1]]


def shown(text: str, size: int, monkeypatch: pytest.MonkeyPatch, height: int = 50) -> str:
    for name, value in {"TERM": "xterm", "COLUMNS": "60", "LINES": str(height)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    stream = MarkdownStream(out)
    stream._console._force_terminal = True
    for i in range(0, len(text), size):
        stream.push(text[i : i + size])
        stream._live.refresh()  # beside the thread that does so now and then
    stream.close()
    return out.getvalue()


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("height", [6, 50])
def test_markdown_ends_the_same_however_it_came(
    size: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = screen(shown(ANSWER, size, monkeypatch, height))
    text = [line for line in lines if line]
    assert "Sums" in text[0] + text[1]
    assert "A sum is a + b, no <b>tag</b>." in text and "Second line" in text
    assert " • one" in text and " • two" in text
    assert any("return a + b" in line for line in text)
    assert text[-1] == "Done."
    assert sum("Done." in line for line in lines) == 1  # nothing that was drawn is left over
    assert lines == screen(shown(ANSWER, 1000, monkeypatch, 50))


def test_code_is_coloured_and_reasoning_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    output = shown("<think>\nHm.\n\nWell.\n</think>\n\nThe *answer*.", 5, monkeypatch)
    text = screen(output)
    assert text[:5] == ["<think>", "Hm.", "", "Well.", "</think>"]
    assert "\x1b[2m" in output and "The answer." in text
    code = shown("```python\ndef f(): return 1\n```\n", 1000, monkeypatch)
    assert re.search(r"\x1b\[[0-9;]+mdef", code)


def test_code_is_coloured_before_its_fence_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    stream = MarkdownStream(out)
    stream.push("```python\ndef f():\n    ret")
    stream._live.refresh()
    drawn = out.getvalue()
    stream.close()
    assert re.search(r"\x1b\[[0-9;]+mdef", drawn)


def test_reasoning_that_the_prompt_began_is_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    stream = MarkdownStream(out, thinking=True)
    for piece in ("Hm *so*.\n\n", "Well.\n</think>\n\n", "An *answer*."):
        stream.push(piece)
    stream.close()
    text = screen(out.getvalue())
    assert text[:5] == ["<think>", "Hm *so*.", "", "Well.", "</think>"]
    assert "An answer." in text


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a\nb\n\nc", ["a\nb\n", "c"]),
        ("\n\na\n\n\n\nb\n\n", ["a\n", "b\n", ""]),
        ("```\na\n\nb\n```\n\nc", ["```\na\n\nb\n```\n", "c"]),
        ("````\n```\n\n````\n\nc", ["````\n```\n\n````\n", "c"]),
        ("~~~ py\n```\n\n~~~\n\nc", ["~~~ py\n```\n\n~~~\n", "c"]),
        ("<think>a\n\nb</think>\nc", ["<think>a\n\nb</think>\n", "c"]),
        ("a\n", ["a\n"]),
    ],
)
def test_blocks_are_cut_where_a_reader_would(text: str, blocks: list[str]) -> None:
    assert split_blocks(text) == blocks
