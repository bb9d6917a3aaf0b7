"""Where the files of a project are, and which paths the parameters may name."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

from tav.config.characters import has_control_characters
from tav_model.errors import TavError
from toyworld import WEIGHTS

# The name of the base model that is part of the project, wherever the project is installed.
EMBEDDED = "toyworld"
# Folders of masks and of given conditions, whose files dvc.yaml names as inputs of stages.
MASKS, CONDITIONS = "data/masks", "data/conditions"
WATCHED_FOLDERS = (CONDITIONS, MASKS)
LONGEST_FILE_NAME = 255  # Bytes; the limit of common file systems.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def project_path(root: Path, text: str, what: str) -> Path:
    """Return the path of a file in the project from its relative path.

    Symbolic links inside the project may lead out of it: the project's owner made them.

    Args:
        root: folder of the project.
        text: relative path.
        what: where the path is given, for messages, such as a key of params.yaml.

    Raises:
        TavError: an absolute path, the project itself, a path with `..`, a backslash or control characters, or a part
            of more than 255 bytes.
    """
    path = Path(text)
    # U+2028 and U+2029 separate lines and paragraphs.
    unprintable = has_control_characters(text, allowed="") or "\u2028" in text or "\u2029" in text
    leads_out = path.is_absolute() or ".." in path.parts or text.startswith("~") or PureWindowsPath(text).anchor
    too_long = any(len(part.encode(errors="replace")) > LONGEST_FILE_NAME for part in path.parts)
    if unprintable or leads_out or too_long or "\\" in text or not text.strip() or not path.parts:
        raise TavError(f"{what}: {text!r} is not allowed: must be a relative path inside the project, without '..'")
    return root / path


class Project:
    """The paths of a project's results and work files; each clip has its own folders.

    Args:
        root: folder of the project, which contains params.yaml.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / ".tav"

    def scene(self, clip: str) -> Path:
        """Return the scene file of a clip, which exists where the ground truth of its edits is known."""
        return self.root / "data" / "scenes" / f"{clip}.json"

    def results(self, clip: str) -> Path:
        """Return the folder of a clip's results, in which those of each stage are."""
        return self.root / "results" / clip

    def frames(self, clip: str) -> Path:
        """Return the output folder of the stage `decode`."""
        return self.results(clip) / "frames"

    def latents(self, clip: str) -> Path:
        """Return the output folder of the stage `encode`."""
        return self.results(clip) / "latents"

    def control(self, clip: str) -> Path:
        """Return the output folder of the stage `annotate`."""
        return self.results(clip) / "control"

    def tuned(self, clip: str) -> Path:
        """Return the output folder of the stage `tune`."""
        return self.results(clip) / "tuned"

    def inverted(self, clip: str) -> Path:
        """Return the output folder of the stage `invert`."""
        return self.results(clip) / "inverted"

    def edits(self, clip: str) -> Path:
        """Return the output folder of the stage `edit`."""
        return self.results(clip) / "edits"

    def quick(self, clip: str) -> Path:
        """Return the folder of quick edits, which DVC does not track."""
        return self.results(clip) / "quick"

    def scores(self, clip: str) -> Path:
        """Return the folder of the scores, from the stage `score`."""
        return self.results(clip) / "scores"

    def contact_sheet(self, clip: str) -> Path:
        """Return the image with frames of the clip and its edits, from the stage `score`."""
        return self.results(clip) / "contact-sheet.png"

    def report(self, clip: str) -> Path:
        """Return the HTML report of a clip."""
        return self.results(clip) / "report.html"

    def reports(self) -> Path:
        """Return the page that links to the reports of all clips."""
        return self.root / "results" / "index.html"

    def timings(self, clip: str) -> Path:
        """Return the file with the duration of each stage on this machine, in seconds."""
        return self.work / "timings" / f"{clip}.json"

    def log(self, clip: str, stage: str) -> Path:
        """Return the log file of one stage of a clip."""
        return self.root / "logs" / clip / f"{stage}.log"


def model_folders() -> list[Path]:
    """Return the folders of models that the environment variable TAV_MODELS names, in its order."""
    return [Path(part).expanduser() for part in os.environ.get("TAV_MODELS", "").split(os.pathsep) if part]


def resolve_model(root: Path, name: str) -> str:
    """Return the folder or hub id of a model that the parameters name.

    In this order: the embedded model (`toyworld`, or a part of it such as `toyworld/scorer`), a folder in the project, a
    folder below one of those in the environment variable TAV_MODELS, a hub id.

    Raises:
        TavError: no such model, with the folders that were searched.
    """
    folder = project_path(root, name, "params.yaml: model")
    embedded = Path(name)
    if embedded.parts[0] == EMBEDDED:
        folder = WEIGHTS.joinpath(*embedded.parts[1:])
    searched = [folder, *(models / name for models in model_folders())]
    for path in searched:
        if path.is_dir():
            return str(path)
    if HUB_ID.fullmatch(name) and not name.startswith(("models/", "data/", f"{EMBEDDED}/")):
        return name
    folders = ", ".join(map(str, searched))
    hint = "; TAV_MODELS can name a folder of models" if searched == [folder] else ""
    raise TavError(f"params.yaml: no model {name!r}: it is neither a folder ({folders}) nor a hub id OWNER/NAME{hint}")
