"""The scorer: a small CLIP (Radford et al., arXiv 2103.00020) of pictures and captions of the world."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tav_model.files import write_json
from toyworld.captions import caption, described, partial_caption, phrase, random_caption
from toyworld.renderer import render
from toyworld.samples import random_scene
from toyworld.scenes import ATTRIBUTES, Scene
from toyworld.training.loop import Part, Settings
from toyworld.training.pictures import DrawnPictures, TrainingSet
from toyworld.training.text import Tokens, save_tokenizer, text_config

SIDE = 128
# Normalization of OpenAI's CLIP, the default of image processors.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# Share of captions that mention only some of the attributes.
PARTIAL = 0.45
# The scorer sees pictures from a denoiser, which have some noise and blur.
NOISE = 0.06
# Pictures of the training set, which are drawn when they are first needed, because that takes longer than learning from
# them. They are mirrored at random.
PICTURES = 100_000
EVALUATED = 256
CHOICES = 64

VISION: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "projection_dim": 64,
}


class ClipPart(Part):
    """The scorer, trained with a contrastive loss in which all pictures that a caption is true of are its positives.

    Captions of a batch differ in several attributes, so that a model which tells the colour need not tell the object. A
    second term therefore asks for each attribute alone: which of its values does the picture have? Their sum outweighs the
    first term, whose noise would otherwise hide the one attribute that is hard to learn, the object.
    """

    name = "clip"

    def __init__(self, settings: Settings, workers: int = 0) -> None:
        from transformers import CLIPConfig, CLIPModel

        super().__init__(settings)
        torch.manual_seed(settings.seed)
        text, vision = {"model_type": "clip_text_model"} | text_config(), {"model_type": "clip_vision_model"} | VISION
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
        self.networks = torch.nn.ModuleDict({"clip": self.clip})
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(Path(folder))
            self.tokens = Tokens(Path(folder))
        self.phrases = [phrase(name, value) for name, values in ATTRIBUTES.items() for value in values]
        self.pictures = TrainingSet(settings.seed, 3)
        self.drawn = DrawnPictures(self.pictures, PICTURES, workers)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return a batch.

        `chosen` (b,): numbers of the pictures; `mirrored` (b,); `tokens` (b, 32); `true` (b, b): which caption is true of
        which picture; `phrases` (v, 32): tokens of every value of every attribute; `values` (b, a): numbers of the pictures'
        values, for each attribute.
        """
        rng = np.random.default_rng([self.settings.seed, step])
        chosen = rng.integers(PICTURES, size=self.settings.batch)
        scenes = [self.pictures.sample(int(i))[0] for i in chosen]
        mirrored = rng.random(len(chosen)) < 0.5
        captions, mentioned = [], []
        for scene in scenes:
            if rng.random() < PARTIAL:
                text, attributes = partial_caption(scene, rng)
            else:
                text, attributes = random_caption(scene, rng), described(scene)
            captions.append(text)
            mentioned.append(attributes)
        return {
            "chosen": torch.from_numpy(chosen),
            "mirrored": torch.from_numpy(mirrored),
            "tokens": self.tokens(captions),
            "true": torch.from_numpy(_truth(mentioned, scenes)),
            "phrases": self.tokens(self.phrases),
            "values": torch.tensor([[v.index(getattr(one, name)) for name, v in ATTRIBUTES.items()] for one in scenes]),
        }

    def prepared(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the batch with the chosen pictures, some of them mirrored, as normalized `pixels` (b, 3, h, w)."""
        pictures = self.drawn[batch.pop("chosen")]
        mirrored = batch.pop("mirrored")[:, None, None, None]
        return {**batch, "pixels": _pixels(torch.where(mirrored, pictures.flip(2), pictures))}

    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Return the mean cross entropy of pictures and captions given each other, plus that of each attribute."""
        pixels = batch["pixels"]
        device = pixels.device
        strength = NOISE / DEVIATION[1] * torch.rand(len(pixels), 1, 1, 1, generator=generator, device=device)
        pixels = pixels + strength * torch.randn(pixels.shape, generator=generator, device=device)
        output = self.clip(input_ids=batch["tokens"], pixel_values=pixels)
        logits = output.logits_per_text.float()
        true = batch["true"].float()
        by_text = -(functional.log_softmax(logits, 1) * true).sum(1) / true.sum(1)
        by_picture = -(functional.log_softmax(logits, 0) * true).sum(0) / true.sum(0)
        phrases = _normalised(self.clip.get_text_features(input_ids=batch["phrases"]))
        by_value = (self.clip.logit_scale.exp() * output.image_embeds @ phrases.T).float()
        by_attribute = [
            functional.cross_entropy(of_attribute, batch["values"][:, i])
            for i, of_attribute in enumerate(by_value.split([len(values) for values in ATTRIBUTES.values()], dim=1))
        ]
        return (by_text.mean() + by_picture.mean()) / 2 + sum(by_attribute)

    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Return how often the right caption of 64, and the right value of each attribute, is recognized."""
        rng = np.random.default_rng(2_000_000_057)
        scenes = [random_scene(rng, unseen=True) for _ in range(EVALUATED)]
        pictures = np.stack([render(scene, float(rng.random())) for scene in scenes])
        images = self._embed_pictures(pictures)
        texts = self._embed_texts([caption(scene) for scene in scenes])
        right = []
        for i, scene in enumerate(scenes):
            others = [j for j in range(EVALUATED) if described(scenes[j]) != described(scene)]
            rivals = rng.choice(others, CHOICES - 1, replace=False)
            right.append(images[i] @ texts[i] > (texts[rivals] @ images[i]).max())
        metrics = {"caption_of_64": float(np.mean(right))}
        for name, values in ATTRIBUTES.items():
            named = (images @ self._embed_texts([phrase(name, value) for value in values]).T).argmax(1)
            metrics[name] = float(np.mean([values[i] == getattr(s, name) for i, s in zip(named, scenes, strict=True)]))
        return metrics, None

    def _embed_pictures(self, pictures: np.ndarray) -> np.ndarray:
        pixels = _pixels(torch.from_numpy(pictures).to(self.clip.device))
        return _rows(self.clip.get_image_features(pixel_values=pixels))

    def _embed_texts(self, texts: list[str]) -> np.ndarray:
        return _rows(self.clip.get_text_features(input_ids=self.tokens(texts).to(self.clip.device)))

    def exported(self) -> dict[str, torch.nn.Module]:
        """Return the scorer."""
        return {"scorer": self.clip}

    def export(self, base: Path) -> None:
        """Write the model, its tokenizer and its image processor to `scorer`."""
        super().export(base)
        folder = base / "scorer"
        save_tokenizer(folder)
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": SIDE},
            "crop_size": {"height": SIDE, "width": SIDE},
            "image_mean": MEAN,
            "image_std": DEVIATION,
        }
        write_json(folder / "preprocessor_config.json", processor)


def _pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Convert `b h w c` uint8 to normalized `b c h w`."""
    mean, deviation = (torch.tensor(values, device=pictures.device) for values in (MEAN, DEVIATION))
    return ((pictures.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


def _truth(mentioned: Sequence[dict[str, str]], scenes: Sequence[Scene]) -> np.ndarray:
    """Return which caption (row) is true of which picture (column)."""
    true = np.ones((len(mentioned), len(scenes)), bool)
    for name in ATTRIBUTES:
        said = np.array([words.get(name, "") for words in mentioned])
        shown = np.array([getattr(scene, name) for scene in scenes])
        true &= (said == "")[:, None] | (said[:, None] == shown)
    return true


def _rows(features: Any) -> np.ndarray:
    return _normalised(features).float().cpu().numpy()


def _normalised(features: Any) -> torch.Tensor:
    return functional.normalize(getattr(features, "pooler_output", features), dim=-1)
