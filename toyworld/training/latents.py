"""The latents of the denoiser's training set, from which the control networks learn as well."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch
from tqdm import tqdm

from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors
from toyworld.training.pictures import TrainingSet
from toyworld.training.vae import to_tensor

# Pictures of the training set. It grows by a chunk after so many samples, so that training starts early, and long trainings
# do not repeat the same pictures too often.
CHUNK, CHUNK_SAMPLES, PICTURES = 10_000, 32_000, 240_000
STREAM = 2  # of the pictures


class Latents:
    """Posterior means and deviations of the training set, computed in chunks when they are first needed, and cached.

    Args:
        seed: seed of the training set.
        vae: folder of the VAE. Its decoder may change later.
        work: folder of the cache.
        device: "cpu", "cuda", ...
        workers: processes that draw pictures; 0: this process draws them.

    Attributes:
        pictures: the training set.
        factor: the VAE's scaling factor.
    """

    def __init__(self, seed: int, vae: Path, work: Path, device: str, workers: int) -> None:
        from diffusers import AutoencoderKL

        if not (vae / "config.json").is_file():
            raise TavError(f"{vae}: no VAE; train it first: python -m toyworld.train vae")
        self.vae = AutoencoderKL.from_pretrained(vae, local_files_only=True)
        encoder = sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                encoder.update(tensor.numpy().tobytes())
        self.vae.to(device, memory_format=torch.channels_last)
        self.factor: float = self.vae.config.scaling_factor
        self.pictures = TrainingSet(seed, STREAM)
        self.work, self.device, self.workers = work, device, workers
        self.made_by = {"encoder": encoder.hexdigest(), "seed": str(seed), "count": str(CHUNK)}
        # Posteriors of all chunks so far, on the device, `2 n c h w` in float16.
        shape = (2, 0, self.vae.config.latent_channels, 16, 16)
        self.posteriors = torch.empty(shape, dtype=torch.float16, device=device)

    def count(self, samples: int) -> int:
        """Return how many pictures there are to choose from after a training has seen so many samples."""
        return min(PICTURES, CHUNK * (1 + samples // CHUNK_SAMPLES))

    def __getitem__(self, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return means and deviations of the pictures with these numbers, each `b c h w` in float32."""
        ready = self.posteriors.shape[1]
        if ready < PICTURES and chosen.max() >= ready:
            numbers = range(ready // CHUNK, int(chosen.max()) // CHUNK + 1)
            with torch.autocast(torch.device(self.device).type, enabled=False):
                added = [self._chunk(number).to(self.device) for number in numbers]
                self.posteriors = torch.cat([self.posteriors, *added], 1)
        means, deviations = self.posteriors[:, chosen].float()
        return means, deviations

    def prepared(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a batch with `means` and `deviations`, (b, c, h, w), in place of the numbers of `chosen` pictures."""
        means, deviations = self[batch["chosen"]]
        others = {name: tensor for name, tensor in batch.items() if name != "chosen"}
        return {**others, "means": means, "deviations": deviations}

    def drawn(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scaled latents drawn from the posteriors of a prepared batch, and noise to add, each (b, c, h, w)."""
        means = batch["means"]
        drawn = torch.randn((2, *means.shape), generator=generator, device=means.device)
        return self.factor * (means + batch["deviations"] * drawn[0]), drawn[1]

    def _chunk(self, number: int) -> torch.Tensor:
        kept = self.work / f"latents-{number}.safetensors"
        if kept.exists():
            tensors, metadata = load_tensors(kept)
            if metadata == self.made_by:
                return tensors["posterior"]
        means, deviations = [], []
        indexes = range(number * CHUNK, (number + 1) * CHUNK)
        batches = tqdm(
            self.pictures.batches(indexes, self.workers),
            desc=f"latents {number}",
            unit="batch",
            mininterval=10,
        )
        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, torch.bfloat16):
            for pictures in batches:
                posterior = self.vae.encode(to_tensor(pictures, self.device)).latent_dist
                means.append(posterior.mean.half().cpu())
                deviations.append(posterior.std.half().cpu())
        latents = torch.stack([torch.cat(means), torch.cat(deviations)])
        save_tensors(kept, {"posterior": latents}, self.made_by)
        return latents
