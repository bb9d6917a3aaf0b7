"""Train the parts of the embedded base model; nothing but the repository is needed.

python -m toyworld.train all                        everything, as for the weights in the repository
python -m toyworld.train vae|clip|unet              one part
python -m toyworld.train decoder                    the VAE's decoder for longer, while the latents stay the same
python -m toyworld.train control                    the control networks: control-edges, control-depth; parts as well
python -m toyworld.train unet --continue            further, from the weights that there are

Several processes share the work if torchrun starts them, each with one thread: on a CPU that others use as well, they wait
for each other far less often than threads do.

torchrun --nproc-per-node 2 -m toyworld.train unet --threads 1
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from tav_model.allocator import keep_freed_memory
from tav_model.errors import TavError

# Steps, batch size, learning rate, decay of the averaged weights, weight decay.
DEFAULTS = {
    "vae": (6000, 8, 4e-3, 0.998, 0.0),
    "clip": (6500, 64, 2e-3, 0.998, 0.01),
    "unet": (16000, 32, 2e-3, 0.999, 0.01),
    "decoder": (4000, 8, 2e-3, 0.998, 0.0),
    "control-edges": (2000, 16, 1e-3, 0.998, 0.01),
    "control-depth": (2000, 16, 1e-3, 0.998, 0.01),
}
# Each part needs the ones before it.
PARTS = tuple(DEFAULTS)
# More steps for the decoder are optional.
GROUPS = {
    "control": tuple(part for part in PARTS if part.startswith("control-")),
    "all": tuple(part for part in PARTS if part != "decoder"),
}


def main(arguments: list[str] | None = None) -> int:
    """Train the parts that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toyworld.train", description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=(*PARTS, *GROUPS), help="part to train; control, all: one after the other")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {_default(0)})")
    parser.add_argument("--batch", type=int, help=f"samples per step (default: {_default(1)})")
    parser.add_argument("--learning-rate", type=float, help=f"peak learning rate (default: {_default(2)})")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that draw samples; 0 is best for a CPU, 8 for a GPU"
    )
    parser.add_argument(
        "--evaluate-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="steps between evaluations (default: %(default)s)",
    )
    parser.add_argument(
        "--save-every", type=int, default=500, metavar="STEPS", help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--base", type=Path, default=Path("toyworld/weights"), help="folder of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("models/training"), help="folder of the checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--continue",
        action="store_true",
        dest="continued",
        help="start from the weights of the base model, with checkpoints of their own, instead of from random weights",
    )
    parser.add_argument(
        "--eager", action="store_true", help="on a GPU, compute each step without a CUDA graph, which is slower"
    )
    parser.add_argument(
        "--tracking-uri",
        default="sqlite:///mlflow.db",
        help="MLflow tracking URI; none: no tracking (default: %(default)s)",
    )
    parser.add_argument(
        "--export",
        action="store_true",
        help="do not train: write the averaged weights of the last checkpoint, finished or not, to the base model",
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("toyworld").setLevel(logging.INFO)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    try:
        if processes > 1:
            import torch.distributed

            torch.distributed.init_process_group("gloo")
        for part in GROUPS.get(options.part, (options.part,)):
            _train(part, options)
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if processes > 1:
            torch.distributed.destroy_process_group()
    return 0


def _default(place: int) -> str:
    return ", ".join(f"{values[place]} for {part}" for part, values in DEFAULTS.items())


def _train(name: str, options: argparse.Namespace) -> None:
    import torch

    from toyworld.training.loop import Part, Settings, Training

    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    steps, batch, learning_rate, averaging, weight_decay = DEFAULTS[name]
    settings = Settings(
        steps=options.steps or steps,
        batch=options.batch or batch,
        learning_rate=options.learning_rate or learning_rate,
        averaging=averaging,
        weight_decay=weight_decay,
        seed=options.seed,
    )
    part: Part
    if name == "vae":
        from toyworld.training.vae import VaePart

        part = VaePart(settings)
    elif name == "decoder":
        from toyworld.training.vae import DecoderPart

        part = DecoderPart(settings, options.base)
    elif name == "clip":
        from toyworld.training.clip import ClipPart

        part = ClipPart(settings, options.workers)
    elif name in GROUPS["control"]:
        from toyworld.training.control import ControlPart

        kind = name.removeprefix("control-")
        part = ControlPart(settings, options.base, kind, options.work, device, options.workers)
    else:
        from toyworld.training.unet import UnetPart

        part = UnetPart(settings, options.base, options.work, device, options.workers)
    if options.continued:
        part.start_from(options.base)
    training = Training(
        part,
        options.work,
        device,
        options.evaluate_every,
        options.save_every,
        options.workers,
        None if options.tracking_uri == "none" else options.tracking_uri,
        graph=not options.eager,
    )
    if options.export:
        if not training.checkpoint.exists():
            raise TavError(
                f"{training.checkpoint}: no checkpoint to export; train first: python -m toyworld.train {name}"
            )
        training.resume(training.checkpoint)
    else:
        training.run()
    if training.rank == 0:
        with training.averaged():
            part.export(options.base)
    training.wait()


if __name__ == "__main__":
    sys.exit(main())
