"""A tuned clip as an MLflow model: loaded from the run, it renders what the pipeline renders."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.support.killing import Forked, wait
from tests.support.projects import QUICK, change_params, fresh_clone, run

LOAD = """
import mlflow, pandas as pd
from pathlib import Path
mlflow.set_tracking_uri("sqlite:///mlflow.db")
(parent,) = mlflow.search_runs(experiment_names=["tav"], filter_string="tags.`tav.kind` = 'pipeline'").run_id
model = mlflow.pyfunc.load_model(f"runs:/{parent}/model")
prompts = pd.DataFrame({"prompt": ["a blue ball is bouncing", "a red cube is bouncing"], "seed": [None, 7]})
answer = model.predict(prompts)
assert list(answer.prompt) == list(prompts.prompt)
for i, video in enumerate(answer.video):
    Path(f"{i}.mp4").write_bytes(video)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_loaded_from_the_run_it_renders_the_same_bits(tmp_path: Path) -> None:
    project = fresh_clone(tmp_path / "project")
    clips = {"ball": {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", "decode": {}}}
    change_params(project, QUICK, clips)
    (project / "data/ball.csv").write_text(
        "name,prompt,seed\nblue,a blue ball is bouncing,\ncube,a red cube is bouncing,7\n"
    )
    wait(Forked(project))
    run(project, "python", "-c", LOAD, TAV_DEVICE="cpu")
    for i, name in enumerate(("blue", "cube")):
        assert (project / f"{i}.mp4").read_bytes() == (project / f"results/ball/edits/{name}.mp4").read_bytes()
    assert not (project / ".tav" / "mlflow" / "ball" / "model").exists()
    assert not [path for path in (project / "mlartifacts").rglob("*") if path.suffix in (".pkl", ".pickle")]

    # Scored again, the same tuning is not logged again; another guidance scale is another run with a link to the model.
    models = sorted((project / "mlartifacts").rglob("MLmodel"))
    stamp = models[0].stat().st_mtime_ns
    run(project, "python", "-m", "tasks", "score", "--clip", "ball")
    assert [path.stat().st_mtime_ns for path in models] == [stamp]
    change_params(project, {"edit": {"guidance_scale": 2.0}})
    wait(Forked(project))
    assert sorted((project / "mlartifacts").rglob("MLmodel")) == models
    with sqlite3.connect(project / "mlflow.db") as store:
        (parents,) = store.execute("select count(*) from tags where key = 'tav.kind' and value = 'pipeline'").fetchone()
        (links,) = store.execute("select count(*) from inputs where destination_type = 'MODEL_INPUT'").fetchone()
    assert (parents, links) == (2, 1)
