"""MLflow's pages for this project: the addresses to open, and what the list of runs and its charts show first.

MLflow 3 opens an experiment on an overview of language models' traces, unless the address asks for model training. The
columns of the list and the order of the charts are a shared view, which MLflow keeps in a tag of the experiment.
"""

from __future__ import annotations

import json
from typing import Any

from tav.config.metrics import METRICS

MODEL_TRAINING = "workflowType=machine_learning"
VIEW = "tav"
# What the list shows of scores and parameters without scrolling; its button "Columns" has the others.
SCORES = ("textual_alignment", "frame_consistency")
PARAMETERS = ("attention.spatial", "tune.steps", "edit.steps", "edit.guidance_scale")
NAME_WIDTH, NUMBER_WIDTH, TEXT_WIDTH = 360, 140, 110  # pixels


def experiment_page(address: str, experiment_id: str) -> str:
    """Return the address of an experiment's list of runs, with the project's columns.

    Args:
        address: of MLflow's pages, such as `http://127.0.0.1:5000`.
        experiment_id: as the store knows the experiment.
    """
    return f"{address}/#/experiments/{experiment_id}/runs?{MODEL_TRAINING}&viewStateShareKey={VIEW}"


def run_page(address: str, experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Return the address of the page of one run, or of one of its artifacts."""
    page = f"{address}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"{page}{'/artifacts/' if artifact else ''}{artifact}?{MODEL_TRAINING}"


def experiment_tags() -> dict[str, str]:
    """Return the tags of the experiment that its pages follow."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": "A run for each clip and configuration; below it, the tuning and each edit.",
        "mlflow.experiment.primaryMetric.name": next(iter(METRICS)),
        "mlflow.experiment.primaryMetric.greaterIsBetter": "true",
        VIEW_TAG: json.dumps(_view(), separators=(",", ":")),
    }


VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""The tag that is kept up to date; a user may have changed the others."""


def _view() -> dict[str, Any]:
    """Return the state of MLflow's page of runs: columns of the list, and charts of scores before all others."""
    metrics = [f"metrics.`{name}`" for name in SCORES]
    parameters = [f"params.`{name}`" for name in PARAMETERS]
    attributes = ["attributes.`Models`", "attributes.`Dataset`"]
    widths = {"attributes.`Run Name`": NAME_WIDTH}
    widths |= dict.fromkeys(metrics, NUMBER_WIDTH) | dict.fromkeys(parameters, TEXT_WIDTH)
    return {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": [*metrics, *parameters, *attributes],
        "columnOrder": [*widths, *attributes],
        "columnWidths": widths | dict.fromkeys(attributes, NUMBER_WIDTH),
        "compareRunSections": [
            _section("scores", "Scores"),
            _section("others", "Model metrics"),
            _section("system", "System metrics"),
        ],
        "compareRunCharts": [
            {
                "type": "BAR",
                "uuid": name,
                "metricSectionId": "scores",
                "metricKey": name,
                "isGenerated": True,
                "deleted": False,
                "runsCountToCompare": 10,
            }
            for name in METRICS
        ],
    }


def _section(identifier: str, name: str) -> dict[str, Any]:
    """Return a section of charts; the first one is open."""
    return {
        "uuid": identifier,
        "name": name,
        "display": identifier == "scores",
        "isReordered": False,
        "deleted": False,
        "isGenerated": identifier != "scores",
    }
