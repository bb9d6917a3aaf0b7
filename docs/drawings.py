"""Diagrams for the documentation, as SVG; `docs/generate.py` writes them to files.

Each diagram has its own background and follows the reader's light or dark colour scheme, so that its text is readable
wherever it is shown.
"""

from __future__ import annotations

from html import escape

STYLE = """
  .card { fill: #ffffff; stroke: #d5dae1; }
  .frozen { fill: #e8ecf2; stroke: #8a94a6; }
  .data { fill: #fdf3d8; stroke: #b98a1d; }
  .tuned { fill: #d9ecff; stroke: #2372b9; }
  .chosen { fill: #2372b9; stroke: #2372b9; }
  .query { fill: #d9480f; stroke: #d9480f; }
  .line { stroke: #566173; fill: none; }
  .tip { fill: #566173; stroke: none; }
  text { fill: #1d2430; font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 14px; }
  .small { font-size: 12px; fill: #4a5463; }
  .title { font-weight: 600; }
  .inverse { fill: #ffffff; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #20242d; stroke: #3a4150; }
    .frozen { fill: #333a48; stroke: #8a94a6; }
    .data { fill: #4a3d17; stroke: #d6a93a; }
    .tuned { fill: #173a5c; stroke: #5aa9ef; }
    .chosen { fill: #3d8fdb; stroke: #3d8fdb; }
    .query { fill: #f0702f; stroke: #f0702f; }
    .line { stroke: #aab4c4; }
    .tip { fill: #aab4c4; }
    text { fill: #eef1f6; }
    .small { fill: #c0c8d4; }
  }
"""


class _Drawing:
    """Boxes, labels and arrows on a background; lengths are in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.header = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{escape(title)}">\n<title>{escape(title)}</title>\n'
            f"<style>{STYLE}</style>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 Z"/></marker></defs>\n'
        )
        self.parts: list[str] = []
        self.box(0.5, 0.5, width - 1, height - 1, "card", corner=10)

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str, corner: int = 5) -> None:
        """Draw a box with centred lines of text, the first of them as its title."""
        self.parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="{corner}" stroke-width="1.5"/>'
        )
        for number, line in enumerate(lines):
            baseline = y + height / 2 + 5 + (number - (len(lines) - 1) / 2) * 17
            style = "inverse" if kind in ("chosen", "query") else "title" if number == 0 else "small"
            self.text(x + width / 2, baseline, line, style, "middle")

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        """Draw one line of text; `anchor` is SVG's text-anchor."""
        self.parts.append(f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line through the points, with a tip at the last one."""
        path = " L".join(f"{x} {y}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path class="line" d="M{path}" stroke-width="1.6"{dashes} marker-end="url(#tip)"/>')

    def svg(self) -> str:
        """Return the diagram as an SVG document."""
        return self.header + "\n".join(self.parts) + "\n</svg>\n"


def pipeline() -> str:
    """Draw the stages and the files between them."""
    d = _Drawing(820, 272, "Video, frames, latents, tuned weights, inverted latents, edits, scores")
    stages = ("decode", "encode", "tune", "invert", "edit", "score")
    files = ("frames", "latents, text", "tuned weights", "inverted noise", "videos", "scores, report")
    for number, (stage, file) in enumerate(zip(stages, files, strict=True)):
        x = 20 + 132 * number
        d.box(x, 84, 112, 44, "tuned", stage)
        d.arrow((x + 56, 128), (x + 56, 158))
        d.box(x - 8, 160, 128, 32, "data", file)
        if number:
            # From the files of the previous stage up to this stage.
            d.arrow((x - 20, 160), (x - 20, 106), (x - 2, 106))
    d.box(20, 20, 112, 34, "frozen", "video")
    d.arrow((76, 54), (76, 82))
    d.box(152, 20, 112, 34, "frozen", "caption")
    d.arrow((208, 54), (208, 82))
    d.box(548, 20, 112, 34, "frozen", "prompt CSV")
    d.arrow((604, 54), (604, 82))
    d.box(152, 216, 112, 40, "tuned", "annotate")
    d.arrow((76, 192), (76, 236), (150, 236))
    d.box(284, 220, 104, 32, "data", "conditions")
    d.arrow((264, 236), (282, 236))
    # Where there is control, up to the stages that it acts in, between the files of the others.
    d.arrow((388, 236), (406, 236), (406, 120), (414, 120), dashed=True)
    d.arrow((406, 236), (538, 236), (538, 120), (546, 120), dashed=True)
    return d.svg()


def inflation() -> str:
    """Draw a transformer block of the image model and its inflated counterpart."""
    d = _Drawing(820, 392, "A transformer block of the image model, and the same block inflated to video")
    d.text(40, 36, "Image model", "title")
    d.text(40, 56, "one picture: b c h w", "small")
    d.text(330, 36, "Inflated to video", "title")
    d.text(330, 56, "f frames: b c f h w, folded to (b f) c h w for the layers of the image model", "small")
    left = (
        ("self-attention", "attn1: within the picture"),
        ("cross-attention", "attn2: to the prompt"),
        ("feed-forward", "ff"),
    )
    right = (
        ("sparse attention", "attn1: keys and values of the first and former frame", "to_q"),
        ("cross-attention", "attn2: to the prompt, repeated for each frame", "to_q"),
        ("feed-forward", "ff: unchanged, frame by frame", ""),
        ("temporal attention", "attn_temp (new): over the frames, at each position", "all weights"),
    )
    for number, (name, code) in enumerate(left):
        d.box(40, 76 + 72 * number, 210, 52, "frozen", name, code)
        if number < 2:
            d.arrow((145, 128 + 72 * number), (145, 146 + 72 * number))
        d.arrow((252, 102 + 72 * number), (326, 102 + 72 * number), dashed=True)
    d.text(289, 94, "weights", "small", "middle")
    for number, (name, what, trained) in enumerate(right):
        y = 76 + 72 * number
        d.box(330, y, 350, 52, "tuned" if trained == "all weights" else "frozen", name, what)
        if trained:
            d.box(700, y + 10, 96, 32, "chosen", trained)
            d.arrow((698, y + 26), (682, y + 26))
        if number < 3:
            d.arrow((505, y + 52), (505, y + 70))
    d.box(40, 350, 22, 22, "chosen")
    d.text(70, 366, "tuned on the clip")
    d.box(220, 350, 22, 22, "frozen")
    d.text(250, 366, "frozen weights of the image model")
    return d.svg()


def attention() -> str:
    """Draw which frames each frame attends to, for four settings."""
    frames, cell = 6, 24
    d = _Drawing(820, 262, "Which frames (columns) each frame (row) attends to, for four settings of attention.spatial")
    sources = {
        "[first, former]": lambda i: {0, max(i - 1, 0)},
        "[self]": lambda i: {i},
        "[first]": lambda i: {0},
        "[all]": lambda i: set(range(frames)),
    }
    notes = ("Tune-A-Video", "as in the image model", "anchored to one frame", "quadratic in the frames")
    for number, ((name, frames_of), note) in enumerate(zip(sources.items(), notes, strict=True)):
        left, top = 44 + 198 * number, 70
        d.text(left, 32, name, "title")
        d.text(left, 52, note, "small")
        for row in range(frames):
            for column in range(frames):
                kind = "chosen" if column in frames_of(row) else "frozen"
                d.box(left + cell * column, top + cell * row, cell - 3, cell - 3, kind, corner=3)
            d.text(left - 10, top + cell * row + 15, str(row + 1), "small", "end")
        for column in range(frames):
            d.text(left + cell * column + 10, top + cell * frames + 14, str(column + 1), "small", "middle")
    d.text(
        44,
        250,
        "Row: the frame that the queries come from. Coloured columns: the frames that keys and values come from.",
        "small",
    )
    return d.svg()


def inversion() -> str:
    """Draw the way from the clip to noise, and from the noise to the edit."""
    d = _Drawing(820, 262, "DDIM inversion turns the clip into noise; DDIM sampling turns that noise into the edit")
    d.box(30, 40, 130, 56, "data", "source latents", "of the clip")
    d.box(645, 103, 150, 56, "chosen", "inverted latents")
    d.box(30, 166, 130, 56, "data", "edited latents", "decoded to video")
    d.box(260, 40, 300, 56, "tuned", "DDIM inversion", "tuned model, empty prompt, no guidance")
    d.box(260, 166, 300, 56, "tuned", "DDIM sampling", "tuned model, edited prompt, guidance")
    d.arrow((162, 68), (257, 68))
    d.arrow((562, 68), (720, 68), (720, 101))
    d.arrow((720, 159), (720, 194), (562, 194))
    d.arrow((258, 194), (163, 194))
    d.text(410, 126, "from clean to noise: preserves layout and motion", "small", "middle")
    d.text(410, 150, "from noise to clean: the prompt decides the content", "small", "middle")
    return d.svg()


def source_branch() -> str:
    """Draw the rows of a sampling step's batch, and what the edit's row takes over from the source's."""
    d = _Drawing(820, 330, "One sampling step: what the edit takes over from the source branch, and what a mask keeps")
    d.box(30, 30, 150, 52, "data", "trajectory", "source latents at t")
    d.box(30, 188, 150, 52, "data", "edit", "its latents at t")
    d.box(240, 30, 240, 52, "tuned", "network, the caption", "one more row of the batch")
    d.box(240, 188, 240, 52, "tuned", "network, the edited prompt", "with guidance")
    d.arrow((182, 56), (238, 56))
    d.arrow((182, 214), (238, 214))
    d.arrow((300, 84), (300, 186))
    d.arrow((420, 84), (420, 186))
    d.text(292, 118, "queries and keys", "small", "end")
    d.text(292, 136, "within and between frames;", "small", "end")
    d.text(292, 154, "features of one block", "small", "end")
    d.text(428, 126, "attention to", "small")
    d.text(428, 144, "shared words", "small")
    d.box(560, 188, 230, 52, "tuned", "one sampling step", "DDIM or DPM-Solver++")
    d.arrow((482, 214), (558, 214))
    d.box(560, 30, 230, 52, "data", "trajectory", "source latents at the next t")
    d.box(560, 272, 230, 40, "chosen", "edit at the next t")
    d.arrow((620, 84), (620, 186), dashed=True)
    d.text(630, 126, "outside of the mask:", "small")
    d.text(630, 144, "the source's latents", "small")
    d.arrow((675, 242), (675, 270))
    return d.svg()


def control() -> str:
    """Draw what a ControlNet sees of a frame, and where what it adds goes."""
    d = _Drawing(
        820, 300, "A control network sees a condition of each frame, and adds to the skip connections of the UNet"
    )
    d.box(30, 30, 130, 52, "data", "frames", "of the clip")
    d.box(200, 30, 130, 52, "frozen", "annotator", "edges, depth, pose")
    d.box(370, 30, 130, 52, "data", "condition", "one picture a frame")
    d.box(560, 30, 230, 52, "frozen", "ControlNet", "a copy of the way down, by frame")
    d.arrow((160, 56), (198, 56))
    d.arrow((330, 56), (368, 56))
    d.arrow((500, 56), (558, 56))
    d.box(30, 216, 130, 52, "data", "noisy latents", "and the prompt")
    d.box(200, 216, 170, 52, "tuned", "way down", "of the inflated UNet")
    d.box(410, 216, 130, 52, "tuned", "middle")
    d.box(580, 216, 210, 52, "tuned", "way up", "of the inflated UNet")
    d.arrow((160, 242), (198, 242))
    d.arrow((370, 242), (408, 242))
    d.arrow((540, 242), (578, 242))
    # Skip connections, with what the ControlNet adds to them; it also sees the noisy latents and the prompt.
    d.arrow((285, 216), (285, 180), (640, 180), (640, 214))
    d.text(300, 172, "skip connections", "small")
    d.arrow((95, 214), (95, 124), (600, 124), (600, 84), dashed=True)
    d.text(105, 116, "the same latents and prompt", "small")
    d.arrow((720, 82), (720, 214))
    d.text(730, 134, "times scale,", "small")
    d.text(730, 152, "added", "small")
    return d.svg()


def orchestration() -> str:
    """Draw the entry points, the stages they share, and what each tool records."""
    d = _Drawing(820, 330, "DVC and Prefect are two entry points to the same stages; MLflow records every run")
    d.box(40, 30, 220, 62, "frozen", "dvc repro, dvc exp run", "one process per stage")
    d.box(300, 30, 220, 62, "frozen", "tav run", "the flow, in this process")
    d.box(560, 30, 220, 62, "frozen", "prefect deployment run", "the flow, in a worker")
    d.arrow((150, 92), (150, 128), (260, 128), (260, 140))
    d.arrow((410, 92), (410, 140))
    d.arrow((670, 92), (670, 128), (560, 128), (560, 140))
    d.box(
        190,
        142,
        440,
        56,
        "tuned",
        "the stages: decode, encode, annotate, tune, invert, edit, score",
        "functions of files and parameters",
    )
    d.arrow((260, 198), (260, 212), (150, 212), (150, 238))
    d.arrow((410, 198), (410, 238))
    d.arrow((560, 198), (560, 212), (670, 212), (670, 238))
    d.box(40, 240, 220, 62, "data", "dvc.lock, DVC cache", "inputs and their results")
    d.box(300, 240, 220, 62, "data", "results/", "the output files")
    d.box(560, 240, 220, 62, "data", "MLflow", "parameters, scores, videos")
    return d.svg()


DRAWINGS = {
    "pipeline": pipeline,
    "inflation": inflation,
    "attention": attention,
    "inversion": inversion,
    "source-branch": source_branch,
    "control": control,
    "orchestration": orchestration,
}
