"""The files for work pools of other kinds, without Docker, Kubernetes or a server: what they name is there."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml
from prefect import Flow
from prefect.utilities.templating import apply_values, find_placeholders

from tests.support.projects import ROOT

KINDS = ("docker", "kubernetes")
HOME = PurePosixPath("/srv/tav")
SHARED = ("TAV_MODELS", "TAV_LOCKS", "HF_HOME", "DVC_SITE_CACHE_DIR")
FILES = ("prefect.yaml", *(f"deploy/{kind}/prefect.yaml" for kind in KINDS))


def load(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


def template(kind: str) -> dict[str, Any]:
    return json.loads((ROOT / f"deploy/{kind}/base-job-template.json").read_text())


def deployments(kind: str) -> list[dict[str, Any]]:
    return load(f"deploy/{kind}/prefect.yaml")["deployments"]


def rendered(kind: str, deployment: dict[str, Any]) -> dict[str, Any]:
    """What the worker makes of the template, without the values of the flow run."""
    given = template(kind)
    properties = given["variables"]["properties"]
    defaults = {name: described["default"] for name, described in properties.items() if "default" in described}
    return apply_values(given["job_configuration"], defaults | deployment["work_pool"]["job_variables"])


@pytest.mark.parametrize("path", FILES)
def test_deployments_are_of_the_flow_and_its_parameters(path: str) -> None:
    for deployment in load(path)["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        assert isinstance(flow, Flow) and flow.name == "tav" and deployment["entrypoint"] == "flows.tav.tav"
        assert set(deployment["parameters"]) == set(inspect.signature(flow.fn).parameters)


def test_no_file_replaces_another_ones_deployment_or_pool() -> None:
    names = [deployment["name"] for path in FILES for deployment in load(path)["deployments"]]
    assert len(set(names)) == len(names)
    pools = [{deployment["work_pool"]["name"] for deployment in load(path)["deployments"]} for path in FILES]
    assert pools == [{"tav"}, {"tav-docker"}, {"tav-kubernetes"}]


@pytest.mark.parametrize("kind", KINDS)
def test_pull_steps_are_prefects(kind: str) -> None:
    for step in load(f"deploy/{kind}/prefect.yaml")["pull"]:
        for name, arguments in step.items():
            module, _, function = name.rpartition(".")
            inspect.signature(getattr(importlib.import_module(module), function)).bind(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_job_variables_are_the_templates(kind: str) -> None:
    given = template(kind)
    properties = given["variables"]["properties"]
    used = {placeholder.name for placeholder in find_placeholders(given["job_configuration"])}
    assert used == set(properties)
    strict = given["variables"] | {"additionalProperties": False}
    for deployment in deployments(kind):
        jsonschema.validate(deployment["work_pool"]["job_variables"], strict)
    for name, described in properties.items():
        if "default" in described:
            jsonschema.validate({name: described["default"]}, strict)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clone_and_what_jobs_share_are_on_the_mounted_folder(kind: str) -> None:
    (step,) = load(f"deploy/{kind}/prefect.yaml")["pull"]
    ((_, arguments),) = step.items()
    assert PurePosixPath(arguments["directory"]) == HOME / "project"
    for deployment in deployments(kind):
        job = rendered(kind, deployment)
        if kind == "docker":
            mounted = [volume.split(":")[1] for volume in job["volumes"]]
        else:
            (container,) = job["job_manifest"]["spec"]["template"]["spec"]["containers"]
            mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert str(HOME) in mounted
        assert all(PurePosixPath(job["env"][name]).parent == HOME for name in SHARED)


def test_one_gpu_where_the_name_says_so_and_shared_memory_everywhere() -> None:
    for deployment in deployments("docker"):
        more = rendered("docker", deployment)["container_create_kwargs"]
        assert more["shm_size"] == "2g"
        counts = [request["count"] for request in more.get("device_requests", [])]
        assert counts == ([1] if deployment["name"].endswith("-gpu") else [])
    for deployment in deployments("kubernetes"):
        pod = rendered("kubernetes", deployment)["job_manifest"]["spec"]["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert limits == ({"nvidia.com/gpu": 1} if deployment["name"].endswith("-gpu") else {})
        (memory,) = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
        assert memory == {"medium": "Memory", "sizeLimit": "2Gi"}
        assert all(type(pod["securityContext"][name]) is int for name in ("runAsUser", "runAsGroup", "fsGroup"))


def test_the_volume_is_the_one_that_the_pods_mount_and_their_users_own() -> None:
    claim, prepare = yaml.safe_load_all((ROOT / "deploy/kubernetes/volume.yaml").read_text())
    prepared = prepare["spec"]["template"]["spec"]
    for deployment in deployments("kubernetes"):
        job = rendered("kubernetes", deployment)
        pod = job["job_manifest"]["spec"]["template"]["spec"]
        (mounted,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert mounted["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert prepared["volumes"] == [mounted]
        assert prepared["securityContext"].items() <= pod["securityContext"].items()
        assert job["namespace"] == claim["metadata"]["namespace"] == prepare["metadata"]["namespace"]
    script = prepared["containers"][0]["args"][-1]
    folders = {"project"} | {PurePosixPath(job["env"][name]).name for name in SHARED}
    assert all(re.search(rf"\b{folder}\b", script) for folder in folders)


def copied() -> list[str]:
    """What the Dockerfile takes from the project."""
    found = []
    for line in (ROOT / "deploy/Dockerfile").read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from"):
            found += words[1:-1]
    return found


def test_the_image_takes_files_that_are_there_and_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {f"!{name}" for name in copied()} == set(rules[1:])
    assert all((ROOT / name).is_file() for name in copied())


def test_the_image_installs_all_packages_of_the_project() -> None:
    listed = re.search(r"for package in ([\w/ ]+);", (ROOT / "deploy/Dockerfile").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert listed and [name.replace("/", ".") for name in listed[1].split()] == packages
    assert project["project"]["readme"] in copied()


def test_the_page_names_files_and_deployments_that_are_there() -> None:
    page = (ROOT / "docs/how-to/many-machines.md").read_text()
    for name in re.findall(r"\bdeploy/[\w./-]*\w", page):
        assert (ROOT / name).exists(), name
    names = {f"tav/{deployment['name']}" for path in FILES for deployment in load(path)["deployments"]}
    assert set(re.findall(r"tav/edit-batch[\w-]*", page)) <= names
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (ROOT / "docs/how-to" / Path(link)).exists(), link
