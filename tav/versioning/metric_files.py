"""The list of scores that `dvc metrics show` and `dvc exp show` read, in metrics/dvc.yaml.

DVC reports each metric of dvc.yaml that is missing as an error, also those of clips that were never run. So the stages do
not declare metrics: a clip's file is listed once it exists. DVC reads every dvc.yaml of a project.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from tav.config.paths import Project
from tav.runtime.locks import waiting_lock
from tav_model.files import write_text

LIST = "metrics/dvc.yaml"
HEADER = """\
# The scores that `dvc metrics show` and `dvc exp show` read: those of each clip that has been scored. The stage `score` adds
# its clip. Commit this file with dvc.lock. (DVC reports metrics of stages that never ran as an error.)
"""


def list_scores(root: Path, clip: str, clips: Container[str]) -> None:
    """Add the scores of a clip to the list, which keeps those of other clips.

    Args:
        root: the project's folder.
        clip: the clip.
        clips: the names of all clips of the project; others are dropped.
    """
    import yaml

    path = root / LIST
    with waiting_lock(Project(root).work / "metrics.lock"):
        try:
            listed = yaml.safe_load(path.read_text(encoding="utf-8"))["metrics"]
            known = {Path(name).parts[-3] for name in listed}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
            known = set()  # Missing or damaged: it is written anew.
        names = sorted({clip, *(name for name in known if name in clips)})
        text = HEADER + "metrics:\n" + "".join(f"  - ../results/{name}/scores/metrics.json\n" for name in names)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
