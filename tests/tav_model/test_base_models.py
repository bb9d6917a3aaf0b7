"""Base models that are not there: what the messages say."""

from pathlib import Path

import pytest

from tav_model.base_models import PARTS, check_base, load_part
from tav_model.errors import TavError


def test_parts_that_a_folder_lacks_are_named(tmp_path: Path) -> None:
    for part in PARTS[:-1]:
        (tmp_path / part).mkdir()
    with pytest.raises(TavError, match=f"{tmp_path}: not a base model in diffusers' layout: no folder {PARTS[-1]}$"):
        check_base(str(tmp_path))
    (tmp_path / PARTS[-1]).mkdir()
    check_base(str(tmp_path))
    check_base("owner/name")


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TavError, match=r"owner/name: no vae can be loaded from it .*the hub cannot be reached"):
        load_part("owner/name", "vae", cache_dir=tmp_path)
