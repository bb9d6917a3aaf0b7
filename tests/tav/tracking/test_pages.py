"""What MLflow's pages are asked to show; that they do is looked at in a browser."""

import json

import pytest

from tav.config.metrics import METRICS
from tav.tracking.pages import PARAMETERS, SCORES, VIEW_TAG, experiment_page, experiment_tags, run_page
from tests.support.browser import browser_window
from tests.support.compared_runs import write_compared_runs
from tests.support.mlflow_store import client, runs
from tests.support.servers import free_port, mlflow_server

MAX_TAG_LENGTH = 5000  # characters, MLflow's limit for a tag of an experiment


def test_the_list_has_scores_and_settings_and_the_charts_begin_with_scores():
    tags = experiment_tags()
    assert max(map(len, tags.values())) <= MAX_TAG_LENGTH
    view = json.loads(tags[VIEW_TAG])
    assert {f"metrics.`{name}`" for name in SCORES} <= set(view["selectedColumns"])
    assert {f"params.`{name}`" for name in PARAMETERS} <= set(view["selectedColumns"])
    assert set(view["columnWidths"]) == set(view["columnOrder"])
    assert [chart["metricKey"] for chart in view["compareRunCharts"]] == list(METRICS)
    assert [section["name"] for section in view["compareRunSections"] if section["display"]] == ["Scores"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_addresses_open_the_list_of_runs_and_a_run(tmp_path):
    write_compared_runs(tmp_path)
    port = free_port()
    experiment = client(tmp_path).get_experiment_by_name("tav").experiment_id
    address = f"http://127.0.0.1:{port}"
    with mlflow_server(tmp_path, port), browser_window() as browser:
        browser.resize(1600, 900)
        browser.call("POST", "url", {"url": experiment_page(address, experiment)})
        browser.wait("document.body.innerText.includes('ball · first,former · 300 steps')", 90)
        headers = "[...document.querySelectorAll('[role=columnheader]')].map(one => one.innerText.trim())"
        browser.wait(f"{headers}.includes('textual_alignment')")
        shown = set(browser.run(f"return {headers}"))
        assert {*SCORES, "attention.spatial", "tune.steps", "edit.guidance_scale"} <= shown
        browser.call("POST", "url", {"url": run_page(address, experiment, runs(tmp_path)[0].info.run_id)})
        browser.wait("document.body.innerText.includes('edit blue')", 60)
