"""Pictures of what commands print on a terminal: `python -m docs.terminal`, in a project where the clip `ball` has results.

Each picture is the real output of a command, drawn by Rich and turned into a PNG by Chromium.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
# By the name of the picture: the width of the terminal in columns, and the command.
COMMANDS = {"terminal-run": (80, "tav run ball"), "terminal-compare": (120, "tav compare ball")}
FONT = "'DejaVu Sans Mono', monospace"
SCALE = 1.5  # pixels of the picture for one of the drawing


def main() -> None:
    """Write the pictures, and print their names."""
    for name, (columns, command) in COMMANDS.items():
        path = PICTURES / f"{name}.png"
        write_png(draw(command, output(command, columns), columns), path)
        print(path.relative_to(PICTURES.parents[1]))


def output(command: str, columns: int) -> str:
    """Return what a command prints on a terminal of that width, with its colours."""
    done = subprocess.run(
        shlex.split(command),
        env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(columns), "TERM": "xterm-256color"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


def draw(command: str, printed: str, columns: int) -> str:
    """Return a terminal with a command and its output as SVG."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=columns, file=nowhere, highlight=False)
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text.from_ansi(printed.rstrip()))
        drawing = console.export_svg(title=f"{columns} columns", theme=MONOKAI)
    # The fonts that Rich refers to are on the web.
    return re.sub(r"Fira Code(, monospace)?", FONT, re.sub(r"@font-face \{.*?\}", "", drawing, flags=re.DOTALL))


def write_png(drawing: str, path: Path) -> None:
    """Write an SVG as PNG."""
    width, height = (round(float(side)) for side in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing).groups())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f"<style>body {{ margin: 0 }} svg {{ display: block; width: {width}px }}</style>{drawing}")
        subprocess.run(
            [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                "--default-background-color=00000000",
                f"--force-device-scale-factor={SCALE}",
                f"--window-size={width},{height}",
                f"--screenshot={path}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )


if __name__ == "__main__":
    main()
