"""The tuned model as MLflow loads it: `mlflow.pyfunc.load_model("runs:/RUN/model").predict(prompts)`.

A run that reuses the tuning of another has a link to that run's model, which `models:/ID` loads.

MLflow runs this file where the model is loaded ("models from code": nothing is pickled). The tuned weights, the
inverted latents and the clip's frames are the model's files, the parameters its configuration.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel

from tav.config import Params
from tav.config.dotted_keys import flatten

COLUMNS = ("prompt", "negative_prompt", "guidance_scale", "steps", "seed", "preset", "control_scale")


def save(
    folder: Path,
    params: Params,
    tuned: Path,
    inverted: Path,
    frames: Path,
    caption: str,
    control: Path | None = None,
) -> None:
    """Write the model of one tuning as a folder that `mlflow.pyfunc.load_model` reads.

    Args:
        folder: a path where nothing exists yet.
        params: of the tuning and the edits.
        tuned: the output of the stage `tune`.
        inverted: the output of the stage `invert`.
        frames: `frames.safetensors` of the stage `decode`; masks from differences keep their pixels.
        caption: what the clip shows.
        control: the output of the stage `annotate`, where control networks act in the edits.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    # Numbers as pandas has them in a column with gaps.
    kinds = (*(DataType.string,) * 2, *(DataType.double,) * 3, DataType.string, DataType.double)
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(kind, name, required=name == "prompt") for name, kind in zip(COLUMNS, kinds, strict=True)
    ]
    outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "prompt"), ColSpec(DataType.binary, "video")]
    sections = params.model_dump(mode="json")
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=__file__,
        artifacts={
            "tuned": str(tuned),
            "inverted": str(inverted),
            "frames": str(frames),
            **({} if control is None else {"control": str(control)}),
        },
        model_config={
            "caption": caption,
            **{name: sections[name] for name in ("base_model", "seed", "attention", "window", "edit")},
        },
        signature=ModelSignature(Schema(inputs), Schema(outputs)),
        pip_requirements=["tav", "mlflow"],
    )


def parameters(params: Params) -> dict[str, Any]:
    """Return what MLflow shows beside the model: how it was tuned, and the settings of edits where a row has none."""
    controlled = ["control"] if params.control else []
    shown = {"base_model", "seed", "attention", "window", "tune", "invert", "edit", *controlled}
    return flatten(params.model_dump(mode="json", include=shown))


class TunedClip(PythonModel):
    """Render edits of one clip by the pipeline's own code."""

    def load_context(self, context: Any) -> None:
        """Keep the folders of the tuned weights and inverted latents, and the configuration."""
        self._folders = {name: Path(path) for name, path in context.artifacts.items()}
        self._config = dict(context.model_config)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Render one edit for each row.

        Args:
            context: unused; `load_context` keeps what is needed of it.
            model_input: the column `prompt`, and, where a row differs from the run's settings, `negative_prompt`,
                `guidance_scale`, `steps`, `seed`, `preset` and `control_scale`.
            params: unused.

        Returns:
            The columns `prompt` and `video`, the bytes of an MP4.

        Raises:
            TavError: the base model or a control network is missing, or is another; or a row cannot be rendered.
        """
        from tasks.rows import RowBatch, render_rows
        from tasks.source_settings import Source
        from tasks.stage_control import StageControl
        from tav.config import AttentionParams, EditParams, WindowParams
        from tav.config.paths import resolve_model
        from tav.config.prompts import PromptRow
        from tav.runtime.devices import choose_device
        from tav.runtime.events import EventStream
        from tav_model.errors import TavError
        from tav_model.vocabulary import read_vocabulary

        rows = []
        for i, row in enumerate(model_input.to_dict("records")):
            given: dict[str, Any] = {name: row[name] for name in COLUMNS if name in row and not pd.isna(row[name])}
            whole: dict[str, Any] = {name: int(given[name]) for name in ("steps", "seed") if name in given}
            rows.append(PromptRow(line=i + 1, name=f"edit-{i}", **given | whole))
        root = Path(tempfile.mkdtemp(prefix="tav-"))
        base = resolve_model(Path.cwd(), self._config["base_model"])
        frames = self._folders["frames"].parent if "frames" in self._folders else None  # Older models have none.
        try:
            batch = RowBatch(
                rows,
                self._folders["inverted"],
                self._folders["tuned"],
                root / "edits",
                root=root,
                base=base,
                vocabulary=read_vocabulary(base),
                attention=AttentionParams(**self._config["attention"]),
                params=EditParams(**self._config["edit"]),
                seed=self._config["seed"],
                device=choose_device(os.environ.get("TAV_DEVICE", "auto")),
                store=root / "store",
                window=WindowParams(**self._config.get("window", {})),  # Older models have none.
                source=Source(root, self._folders["inverted"], self._config.get("caption", ""), frames),
                control=StageControl.read(Path.cwd(), folder, "edit")
                if (folder := self._folders.get("control"))
                else None,
            )
            for result in render_rows(batch, batch.rows, EventStream()):
                if result.error is not None:
                    raise TavError(f"{result.row.prompt!r}: {result.error}")
            videos = [(batch.store / row.identity / "edit.mp4").read_bytes() for row in batch.rows]
        finally:
            shutil.rmtree(root, ignore_errors=True)
        return pd.DataFrame({"prompt": [row.prompt for row in rows], "video": videos})


mlflow.models.set_model(TunedClip())
