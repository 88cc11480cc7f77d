"""Markdown on a terminal while it is being written: what is complete stays, the rest is redrawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from engine.chat.conversation import END_OF_THINK, THINK

_DRAWINGS_PER_SECOND = 15


class MarkdownStream:
    """Pieces of a text, shown as Markdown on a terminal; `close` shows what is left of it.

    A block (a paragraph, a list, fenced code) is redrawn as it grows and printed for good when the
    next one begins. Reasoning between <think> tags is dim and no Markdown; with `thinking` the text
    begins within it.
    """

    def __init__(self, file: IO[str], thinking: bool = False) -> None:
        self._console = Console(file=file, highlight=False)
        # What is not printed yet. Of reasoning that began in the prompt the tag is missing.
        self._block = f"{THINK}\n" if thinking else ""
        self._printed = False
        self._live = _Drawing(
            get_renderable=lambda: _Tail(render(self._block)),
            console=self._console,
            transient=True,
            refresh_per_second=_DRAWINGS_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def push(self, piece: str) -> None:
        self._block += piece
        *complete, self._block = split_blocks(self._block)
        for block in complete:
            self._print(block)
        self._live.is_current = False

    def close(self) -> None:
        rest, self._block = self._block, ""
        self._live.stop()
        if rest.strip():
            self._print(rest)

    def _print(self, block: str) -> None:
        if self._printed:
            self._console.print()
        self._console.print(render(block))
        self._printed = True


def split_blocks(text: str) -> list[str]:
    """Cut at blank lines, but not inside of fences and of reasoning; the last part may go on."""
    blocks, fence, thinking, begin, at = [], "", False, 0, 0
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if at == begin and not bare:  # blank lines between blocks belong to none
            begin = at + len(line)
        elif thinking or (not fence and bare.startswith(THINK)):
            thinking = END_OF_THINK not in line
            if not thinking and line.endswith("\n"):
                blocks.append(text[begin : at + len(line)])
                begin = at + len(line)
        elif fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                fence = ""
        elif bare.startswith(("```", "~~~")):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
        elif not bare and line.endswith("\n"):
            blocks.append(text[begin:at])
            begin = at + len(line)
        at += len(line)
    return [*blocks, text[begin:]]


def render(block: str) -> RenderableType:
    """One block: reasoning dimmed, Markdown otherwise, whose single line ends are kept."""
    if block.lstrip().startswith(THINK):
        return Text(block.strip(), style="dim")
    markdown = Markdown(block, code_theme="ansi_dark")
    # Parsed again, since tags are text here: rich would leave them out.
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    markdown.parsed = parser.parse(block)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return markdown


class _Drawing(Live):
    """Draws from a thread of its own, but only what has changed."""

    is_current = False

    def refresh(self) -> None:
        if not self.is_current:
            self.is_current = True
            super().refresh()


class _Tail:
    """The last lines of something, as many as the terminal can redraw."""

    def __init__(self, whole: RenderableType) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: Iterable[list[Segment]] = console.render_lines(self._whole, options, pad=False)
        for line in list(lines)[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()
