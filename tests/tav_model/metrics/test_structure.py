"""Structure distance with a small random vision transformer."""

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from tav_model.errors import TavError
from tav_model.metrics.structure import StructureModel, structure_distance

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(**shape, image_size=32, patch_size=8), add_pooling_layer=False)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_distance_is_that_of_the_cosines_of_the_keys(folder):
    model = StructureModel(str(folder))
    other = FRAMES[::-1].copy()
    seen = []
    names = [name for name, _ in model.model.named_modules() if name.rpartition(".")[2] in ("key", "k_proj")]
    hook = model.model.get_submodule(names[-1]).register_forward_hook(lambda _, __, output: seen.append(output))
    for frames in (FRAMES, other):
        pixels = torch.from_numpy(frames / 127.5 - 1).float().permute(0, 3, 1, 2)
        with torch.no_grad():
            model.model(pixels)
    hook.remove()
    assert seen[0].shape == (3, 17, 16)
    expected = np.mean(
        [
            np.mean(
                [
                    (torch.cosine_similarity(a[i], a[j], 0) - torch.cosine_similarity(b[i], b[j], 0)).item() ** 2
                    for i in range(17)
                    for j in range(17)
                ]
            )
            for a, b in zip(*seen, strict=True)
        ]
    )
    assert structure_distance(model, FRAMES, other) == pytest.approx(expected, rel=1e-3)
    assert structure_distance(model, FRAMES, FRAMES) == 0


def test_frames_are_processed_in_chunks(folder):
    model = StructureModel(str(folder))
    together, apart = (torch.stack(list(model.keys(FRAMES, chunk))) for chunk in (3, 2))
    torch.testing.assert_close(together, apart)


def test_what_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(TavError, match=r"no vision transformer can be loaded"):
        StructureModel(str(tmp_path))
    with pytest.raises(TavError, match=r"frames: 3, but the source has 2"):
        structure_distance(StructureModel(str(folder)), FRAMES, FRAMES[:2])
