"""The documentation's pages as tests read them: blocks of commands, files that a page shows, and what is needed for them.

In a page,

    ```sh            every line is a command
    ```console       a line after `$ ` is a command, the others are what it printed
    ```TYPE title="PATH"     a file that the page tells the reader to write

and a comment above a block says what is special about it:

    <!-- needs: gpu -->      not run by tests: WHAT of `NEEDS` is missing there
    <!-- exits: 2 -->        the exit code of its last command, where that is not 0

A page with the comment `<!-- long -->` takes more than seconds; `make test-long` runs it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a test's machine need not have, as the comments call it.
NEEDS = {
    "gpu": "a GPU, and Stable Diffusion's weights",
    "installation": "a package index, for a new environment",
    "remote": "a git remote or a cloud's storage",
    "machine": "another machine",
    "docker": "Docker",
    "kubernetes": "a Kubernetes cluster",
    "browser": "a desktop",
    "tests": "the test suite itself",
}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (needs|exits): ([\w-]+) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        kind: the language.
        title: the file that it is, or empty.
        needs: what a machine must have to run it, a key of `NEEDS`, or empty.
        exits: the exit code of the last command.
    """

    page: Path
    line: int
    kind: str
    title: str
    text: str
    needs: str
    exits: int

    @property
    def commands(self) -> list[str]:
        """The commands, each with its continuation lines."""
        if self.kind == "sh":
            lines = self.text.splitlines()
        elif self.kind == "console":
            lines = _after_prompts(self.text)
        else:
            return []
        joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
        return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _after_prompts(text: str) -> list[str]:
    lines, continues = [], False
    for line in text.splitlines():
        if continues or line.startswith("$ "):
            lines.append(line.removeprefix("$ "))
            continues = line.endswith("\\")
    return lines


def pages() -> list[Path]:
    """The README and all of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        info = match["info"].strip()
        kind, _, options = info.partition(" ")
        title = re.search(r'title="([^"]+)"', options)
        special = {"needs": "", "exits": "0"}
        above = text[: match.start()].rstrip()
        while comment := _COMMENT.search(above):
            special[comment[1]] = comment[2]
            above = above[: comment.start()].rstrip()
        indent = len(match["indent"])
        body = "".join(line[indent:] if line.strip() else line for line in match["body"].splitlines(True))
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, kind, title[1] if title else "", body, special["needs"], int(special["exits"])))
    return found


def is_long(page: Path) -> bool:
    return "<!-- long -->" in page.read_text(encoding="utf-8")


def is_run(page: Path) -> bool:
    """Whether there is a command in the page that a test's machine can run."""
    return any(block.commands and not block.needs for block in blocks(page))


def simple_commands(line: str) -> list[list[str]]:
    """The programs of one line of shell, each with its arguments: without pipes, redirections and variables before them.

    Raises:
        ValueError: quotes that do not close.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif set(word) <= set(";&|"):
            found.append([])
        elif set(word) <= set("<>&"):
            skip = True
            if found[-1] and found[-1][-1] == "2":
                found[-1].pop()
        elif found[-1] or not re.fullmatch(r"[A-Za-z_]\w*=.*", word):
            found[-1].append(word)
    return [command for command in found if command]
