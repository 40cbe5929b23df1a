"""Printing: the same text for a terminal and for a pipe."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 160  # columns of tables when the output is no terminal


def print_json(value: Any) -> None:
    """JSON and nothing else on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False))


class _Trimmed:
    """A stream that drops the blanks with which tables fill their lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.stream.write(re.sub(r" +(?=\n)", "", text))


def make_console() -> Console:
    """For stdout: colours and the terminal's width, or plain text of a fixed width when piped."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)
    width = None if "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=_Trimmed(sys.stdout), width=width, highlight=False)


def say(console: Console, text: str = "", style: str = "") -> None:
    """Print plain text; in a pipe, lines are never broken."""
    from rich.text import Text

    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def status(text: str, show: bool = True) -> AbstractContextManager:
    """A spinner on stderr while the block runs, when that is a terminal."""
    if not show or not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)
