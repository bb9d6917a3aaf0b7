"""Draw random scenes with random edits, for benchmarks on clips that nothing was tuned for.

python -m benchmarks.random_scenes FOLDER --count 6 --seed 7
python -m benchmarks.toyworld method --scenes FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from tav_model.errors import TavError
from toyworld.samples import random_scene
from toyworld.scenes import ATTRIBUTES, CATEGORIES, Scene, save_truth

FRAMES = 24
SEVERAL = (2, 3)  # attributes


def draw(rng: np.random.Generator, unseen: bool) -> tuple[Scene, dict[str, dict[str, str]]]:
    """Return a random scene, and the changes of its edits by name: of its colour, object, background, style, of several.

    Args:
        rng: random numbers.
        unseen: whether the base model was not trained on the scene's combination of object, colour and ground.
    """
    scene = random_scene(rng, unseen)
    background = "ground" if rng.random() < 0.5 else "sky"
    several: set[str] = set()
    while frozenset(several) in CATEGORIES or not several:
        several = set(rng.choice(list(ATTRIBUTES), rng.choice(SEVERAL), replace=False))
    edits = {}
    for names in ({"colour"}, {"object"}, {background}, {"style"}, several):
        changes = {name: _other(rng, name, getattr(scene, name)) for name in ATTRIBUTES if name in names}
        edits["-".join(changes.values()).replace(" ", "-")] = changes
    return scene, edits


def _other(rng: np.random.Generator, attribute: str, value: str) -> str:
    others = [other for other in ATTRIBUTES[attribute] if other != value]
    return others[rng.integers(len(others))]


def main(arguments: list[str] | None = None) -> int:
    """Write the scenes, and return the exit code."""
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_scenes",
        description=summary,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder to write them to, which must not exist or be empty")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="number of scenes (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, required=True, metavar="N", help="choose one that no benchmark has been run with"
    )
    options = parser.parse_args(arguments)
    try:
        if options.count < 1 or options.seed < 0:
            raise TavError("--count must be at least 1, and --seed at least 0")
        if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
            raise TavError(f"{options.folder}: must not exist or be an empty folder")
        for number in range(options.count):
            # Every other one is of those that the base model was not trained on.
            scene, edits = draw(np.random.default_rng([options.seed, number]), unseen=number % 2 == 1)
            path = options.folder / f"{number + 1:02}-{scene.motion}-{scene.object}.json"
            save_truth(path, scene, FRAMES, edits)
            print(f"{path}: {', '.join(edits)}")
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
