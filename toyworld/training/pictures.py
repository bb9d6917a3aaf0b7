"""Pictures of training sets, drawn by as many processes as there are to help."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from toyworld.renderer import render
from toyworld.samples import random_scene
from toyworld.scenes import Scene

BATCH = 100


class TrainingSet(Dataset[np.ndarray]):
    """The pictures of a training set, which a seed and a number determine; item i is `h w c` in uint8.

    Args:
        seed: seed of the pictures.
        stream: distinguishes the pictures of one part from those of another.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self.seed, self.stream = seed, stream

    def sample(self, index: int) -> tuple[Scene, float]:
        """Return the scene of a picture, and its time from 0 to 1."""
        rng = np.random.default_rng([self.seed, index, self.stream])
        return random_scene(rng), float(rng.random())

    def __getitem__(self, index: int) -> np.ndarray:
        return render(*self.sample(index))

    def batches(self, indexes: Sequence[int], workers: int) -> DataLoader[np.ndarray]:
        """Return an iterable of the pictures in batches, `b h w c` in uint8.

        Args:
            indexes: numbers of the pictures.
            workers: processes that draw; 0: this process draws.
        """
        return DataLoader(self, BATCH, sampler=indexes, num_workers=workers, collate_fn=np.stack)


class DrawnPictures:
    """The pictures of a training set, in memory; each is drawn when it is first needed, or all at once by processes.

    Args:
        pictures: the training set.
        count: number of pictures.
        workers: processes that draw all pictures at once; 0: this process draws what is needed.
    """

    def __init__(self, pictures: TrainingSet, count: int, workers: int) -> None:
        self.pictures, self.workers = pictures, workers
        self.kept = torch.from_numpy(np.zeros((count, 128, 128, 3), np.uint8))  # Takes memory as it is written to.
        self.missing = np.ones(count, bool)

    def __getitem__(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return the pictures with these numbers, `b h w c` in uint8, on the device of `chosen`."""
        if self.missing.any():
            needed = np.arange(len(self.missing)) if self.workers else np.unique(chosen.cpu().numpy())
            self._draw(needed[self.missing[needed]])
        if self.workers:
            self.kept = self.kept.to(chosen.device)
        return self.kept[chosen.to(self.kept.device)].to(chosen.device)

    def _draw(self, numbers: np.ndarray) -> None:
        place = 0
        for batch in self.pictures.batches(numbers.tolist(), self.workers):
            these = numbers[place : place + len(batch)]
            self.kept[these] = torch.from_numpy(batch)
            self.missing[these] = False
            place += len(batch)
