"""`tav doctor`: what it finds in a sound and in a broken project."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from tav_cli import doctor
from tests.support.projects import change_params
from tests.support.servers import free_port
from tests.support.tav_command import Ended, Tav


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free ones, whatever runs on this machine."""
    found = {"prefect": free_port(), "mlflow": free_port()}
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{found['prefect']}/api")
    monkeypatch.setenv("TAV_MLFLOW_PORT", str(found["mlflow"]))
    return found


def checks(ended: Ended) -> dict[str, dict[str, str]]:
    answer = json.loads(ended.out)
    found = {check["name"]: check for check in answer["checks"]}
    problems = [check for check in found.values() if check["state"] == "problem"]
    assert answer["problems"] == len(problems) and ended.code == bool(problems)
    assert all(check["advice"] or check["found"] for check in problems)
    return found


NAMES = ["Python", "packages", "torch", "GPU", "threads", "memory", "disk", "codecs", "git", "DVC", "params.yaml"]
NAMES += ["clips", "device", "base model", "clip_model", "Prefect", "MLflow"]


def test_doctor_finds_a_project_well(
    tav: Tav, done: Path, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAV_MODELS", raising=False)
    change_params(done, {"score": {"clip_model": "toyworld/scorer"}, "tracking": {"uri": "sqlite:///mlflow.db"}})
    monkeypatch.setattr(doctor, "MEMORY_GIB", (0, 0))
    monkeypatch.setattr(doctor, "DISK_GIB", (0, 0))
    found = checks(tav("doctor", "--json"))
    assert list(found) == NAMES
    states = {name: check["state"] for name, check in found.items()}
    # Other people's programs and packages are no fault of the project's.
    assert set(states.values()) <= {"ok", "warning"}
    assert {states[name] for name in NAMES if name not in ("packages", "threads", "torch", "GPU", "DVC")} == {"ok"}
    assert found["Prefect"]["found"] == f"port {ports['prefect']} is free for tav up"
    assert found["MLflow"]["found"].startswith("the first run will create mlflow.db")
    assert "H.264" in found["codecs"]["found"] and "clip_model" in found
    lines = tav("doctor").out.splitlines()
    assert lines[0].startswith("ok") and "Python" in lines[0]
    assert not any(line.startswith("ok") for line in tav("doctor", "--quiet").out.splitlines())


def test_doctor_says_what_is_wrong_and_what_to_do(
    tav: Tav, done: Path, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def codecs() -> doctor.Check:
        raise RuntimeError("an error of a library")

    monkeypatch.setattr(doctor, "_codecs", codecs)
    monkeypatch.setattr(doctor, "DISK_GIB", (10**6, 10**6))
    monkeypatch.setattr(doctor, "MEMORY_GIB", (0, 10**6))
    shutil.rmtree(done / ".git")
    (done / ".dvc/config").unlink()
    (done / "constraints.txt").write_text("# tested\npytest==0.1\nno-such-package==1.0\n")
    (done / "data/ball.mp4").unlink()
    (done / "models/cut/unet").mkdir(parents=True)
    for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        (done / "models/cut" / part).mkdir(exist_ok=True)
        (done / "models/cut" / part / "config.json").write_text("{}")
    header = b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
    (done / "models/cut/unet/x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    (done / "mlflow.db").write_text("no database" * 99)
    control = [{"kind": "canny", "model": "models/none"}]
    changes = {
        "base_model": "models/cut",
        "control": control,
        "tracking": {"uri": "sqlite:///mlflow.db"},
        "runtime": {"device": "cuda:99"},
    }
    change_params(done, changes)
    with socket.create_server(("127.0.0.1", ports["prefect"])):
        found = checks(tav("doctor", "--json"))
    wrong = {name: check["found"] for name, check in found.items() if check["state"] == "problem"}
    assert "RuntimeError: an error of a library" in wrong.pop("codecs")
    assert "not a git repository" in wrong.pop("git") and wrong.pop("DVC") == "no .dvc folder here"
    assert wrong.pop("clips").startswith("ball: data/ball.mp4: no such file")
    assert "x.safetensors: not a complete safetensors file" in wrong.pop("base model")
    assert "no model 'models/none'" in wrong.pop("control model")
    assert "'cuda:99' is not usable here" in wrong.pop("device") and "GiB free" in wrong.pop("disk")
    assert "file is not a database" in wrong.pop("MLflow") and wrong == {}
    warned = {name: check["found"] for name, check in found.items() if check["state"] == "warning"}
    assert re.fullmatch(r"pytest \S+ \(tested: 0.1\)", warned["packages"]) and "memory" in warned
    assert f"port {ports['prefect']} is taken by another program" in warned["Prefect"]


def test_doctor_lists_the_models_in_the_folders_of_the_user(
    tav: Tav, done: Path, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    monkeypatch.setenv("TAV_MODELS", str(models))
    for state, known in (
        ("problem", "no such folder"),
        ("warning", "no models"),
        ("ok", "large-clip, small-diffusion"),
    ):
        check = checks(tav("doctor", "--json"))["TAV_MODELS"]
        assert (check["state"], check["found"]) == (state, f"{models}: {known}")
        if state == "problem":
            models.mkdir()
            continue
        (models / "small-diffusion/unet").mkdir(parents=True, exist_ok=True)
        (models / "large-clip").mkdir(exist_ok=True)
        (models / "large-clip/config.json").write_text("{}")


def test_doctor_of_a_broken_params_yaml(tav: Tav, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_torch", "_gpus", "_codecs", "_packages"):
        monkeypatch.setattr(doctor, name, lambda *_: doctor.Check("x", "ok", ""))
    monkeypatch.setenv("COLUMNS", "400")
    (new / "params.yaml").write_text("tune: {stepz: 3}\n")
    ended = tav("doctor")
    assert ended.code == 1 and ended.out.splitlines()[-2].startswith("problem  params.yaml  params.yaml: ")
    assert "unknown key; did you mean steps?" in ended.out
