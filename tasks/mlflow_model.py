"""The tuned model as MLflow loads it: `mlflow.pyfunc.load_model("runs:/RUN/model").predict(prompts)`.

MLflow runs this file where the model is loaded (its "models from code": nothing is pickled), with the tuned weights and
the inverted latents as the model's files and the parameters as its configuration.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel

from tav.config import Params

COLUMNS = ("prompt", "negative_prompt", "guidance_scale", "steps", "seed")


def save(folder: Path, params: Params, tuned: Path, inverted: Path) -> None:
    """Write the model of one tuning as a folder that `mlflow.pyfunc.load_model` takes.

    Args:
        folder: not there yet.
        params: of the tuning and the edits.
        tuned, inverted: the stages' outputs.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    # Numbers as pandas has them in a column with gaps.
    kinds = (DataType.string, DataType.string, DataType.double, DataType.double, DataType.double)
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(kind, name, required=name == "prompt") for name, kind in zip(COLUMNS, kinds, strict=True)
    ]
    outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "prompt"), ColSpec(DataType.binary, "video")]
    sections = params.model_dump(mode="json")
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=__file__,
        artifacts={"tuned": str(tuned), "inverted": str(inverted)},
        model_config={name: sections[name] for name in ("base_model", "seed", "attention", "edit")},
        signature=ModelSignature(Schema(inputs), Schema(outputs)),
        pip_requirements=["tav", "mlflow"],
    )


class TunedClip(PythonModel):
    """Edits of one clip, by the pipeline's own code."""

    def load_context(self, context: Any) -> None:
        self._folders = {name: Path(path) for name, path in context.artifacts.items()}
        self._config = dict(context.model_config)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One edit for each row.

        Args:
            model_input: the column `prompt`, and, where a row wants them otherwise than the run, `negative_prompt`,
                `guidance_scale`, `steps` and `seed`.

        Returns:
            The columns `prompt` and `video`, the bytes of an MP4.

        Raises:
            TavError: a base model that is not here or another than the tuned one.
        """
        from tasks.rows import RowBatch
        from tav.config import AttentionParams, EditParams
        from tav.config.paths import resolve_model
        from tav.config.prompts import PromptRow
        from tav.runtime.devices import choose_device

        rows = []
        for i, row in enumerate(model_input.to_dict("records")):
            given: dict[str, Any] = {name: row[name] for name in COLUMNS if name in row and not pd.isna(row[name])}
            whole: dict[str, Any] = {name: int(given[name]) for name in ("steps", "seed") if name in given}
            rows.append(PromptRow(line=i + 1, name=f"edit-{i}", **given | whole))
        root = Path(tempfile.mkdtemp(prefix="tav-"))
        try:
            batch = RowBatch(
                rows,
                self._folders["inverted"],
                self._folders["tuned"],
                root / "edits",
                root=root,
                base=resolve_model(Path.cwd(), self._config["base_model"]),
                attention=AttentionParams(**self._config["attention"]),
                params=EditParams(**self._config["edit"]),
                seed=self._config["seed"],
                device=choose_device(os.environ.get("TAV_DEVICE", "auto")),
                store=root / "store",
            )
            for edit in batch.todo():
                batch.render(edit)
            videos = [(batch.store / edit.identity / "edit.mp4").read_bytes() for edit in batch.edits]
        finally:
            shutil.rmtree(root, ignore_errors=True)
        return pd.DataFrame({"prompt": [row.prompt for row in rows], "video": videos})


mlflow.models.set_model(TunedClip())
