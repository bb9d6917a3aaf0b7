"""Where the files of a project lie, and which paths that parameters and CSVs name are allowed."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path, PureWindowsPath

from tav_model.errors import TavError
from toyworld import WEIGHTS

# The base model that comes with the project, wherever that is installed.
EMBEDDED = "toyworld"
LONGEST_NAME = 255  # bytes; file systems take no longer one
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def project_path(root: Path, text: str, what: str) -> Path:
    """The path `text`, which must be relative and stay in the project.

    Links inside the project may lead out of it: they are the owner's own doing.

    Args:
        what: where the text stands, for the message.

    Raises:
        TavError: an absolute path, the project itself, a path with `..`, or with what no file name here has: a
            backslash, control characters, a part of more than 255 bytes.
    """
    path = Path(text)
    # Control characters, halves of characters, and separators of lines.
    unprintable = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
    leaves = path.is_absolute() or ".." in path.parts or text.startswith("~") or PureWindowsPath(text).anchor
    too_long = any(len(part.encode(errors="replace")) > LONGEST_NAME for part in path.parts)
    if unprintable or leaves or too_long or "\\" in text or not text.strip() or not path.parts:
        raise TavError(f"{what}: {text!r} is not allowed: must be a relative path inside the project, without '..'")
    return root / path


class Project:
    """The layout of a project's results and work files; every clip has folders of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / ".tav"

    def scene(self, clip: str) -> Path:
        """Where the truth of a clip's edits lies, if it is known."""
        return self.root / "data" / "scenes" / f"{clip}.json"

    def frames(self, clip: str) -> Path:
        return self.root / "results" / clip / "frames"

    def latents(self, clip: str) -> Path:
        return self.root / "results" / clip / "latents"

    def tuned(self, clip: str) -> Path:
        return self.root / "results" / clip / "tuned"

    def inverted(self, clip: str) -> Path:
        return self.root / "results" / clip / "inverted"

    def edits(self, clip: str) -> Path:
        return self.root / "results" / clip / "edits"

    def quick(self, clip: str) -> Path:
        """Edits that were made at once, which DVC does not know."""
        return self.root / "results" / clip / "quick"

    def scores(self, clip: str) -> Path:
        return self.root / "results" / clip / "scores"

    def contact_sheet(self, clip: str) -> Path:
        return self.root / "results" / clip / "contact-sheet.png"

    def report(self, clip: str) -> Path:
        return self.root / "results" / clip / "report.html"

    def reports(self) -> Path:
        """The page that leads to the reports of all clips."""
        return self.root / "results" / "index.html"

    def timings(self, clip: str) -> Path:
        """How long each stage has taken here, in seconds."""
        return self.work / "timings" / f"{clip}.json"

    def log(self, clip: str, stage: str) -> Path:
        return self.root / "logs" / clip / f"{stage}.log"


def resolve_model(root: Path, name: str) -> str:
    """The folder or hub id that the name of a model in the parameters means.

    In this order: the embedded model (`toyworld`, and its parts, as `toyworld/scorer`), a folder inside the project, a
    folder below one of those in the environment's TAV_MODELS, a hub id.

    Raises:
        TavError: none of these, with where it was looked for.
    """
    folder = project_path(root, name, "params.yaml: model")
    embedded = Path(name)
    if embedded.parts[0] == EMBEDDED:
        folder = WEIGHTS.joinpath(*embedded.parts[1:])
    if folder.is_dir():
        return str(folder)
    elsewhere = [Path(part).expanduser() for part in os.environ.get("TAV_MODELS", "").split(os.pathsep) if part]
    for models in elsewhere:
        if (models / name).is_dir():
            return str(models / name)
    if HUB_ID.fullmatch(name) and not name.startswith(("models/", "data/", f"{EMBEDDED}/")):
        return name
    looked = ", ".join(str(path) for path in [folder, *(models / name for models in elsewhere)])
    raise TavError(f"params.yaml: no model {name!r}: it is neither a folder ({looked}) nor a hub id OWNER/NAME")
