"""Rows of a prompt CSV, the unit of work of an edit: which are done, and how the others are rendered.

A row's identity is a digest of everything that its video depends on. A row that was rendered before, and whose files are
still somewhere, is not rendered again, and a row that fails fails alone.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.model_loading import MODEL_LOADING
from tasks.source_settings import (
    OF_THE_FIRST_LATENTS,
    Source,
    is_pasted,
    is_pixel_mask,
    mask_image,
    source_arguments,
    uses_caption,
    uses_trajectory,
)
from tasks.stage_control import StageControl
from tav.config import AttentionParams, EditParams, WindowParams
from tav.config.presets import DIFFERENCE, NO_MASK, WORDS
from tav.config.prompts import EditRow, PromptRow
from tav.config.results import EDIT_SUFFIXES, read_record
from tav.runtime.devices import resolve_precision, retry_with_smaller_batch
from tav.runtime.events import EventStream, RowFinished
from tav.runtime.progress import Progress
from tav.versioning.cache_lookup import previous_output
from tav_model.base_models import base_digest, load_pipeline
from tav_model.digests import canonical_json, digest
from tav_model.errors import FullDiskError, TavError, first_line
from tav_model.files import atomic_folder, read_json, write_json
from tav_model.tensors import load_tensors, read_metadata, read_shape

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tav_model import TuneAVideoPipeline
    from tav_model.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# Part of every identity: increase it when the files that a row leaves change.
FORMAT = "3"
PARTIAL = ".partial"  # folders in the store of rows that are rendered window by window
MASK_SETTINGS = ("mask_inverted", "mask_feather")  # that the metrics of what stays need
OnStep = Callable[[Sequence[EditRow], int], None]
"""Called with the rows sampled together and by how many steps they have advanced, which is negative for a failed attempt."""


@dataclass(frozen=True)
class RowResult:
    """The result of a row.

    Attributes:
        rendered: whether it was rendered now; False where it was found, or has failed.
        error: why there is no video, in one line; None where there is one.
    """

    row: EditRow
    rendered: bool = False
    error: str | None = None


class RowBatch:
    """The rows of one clip with every setting resolved: which are done, and the results folder of them all.

    Args:
        inverted, tuned: the outputs of the stages before.
        out: the results folder.
        base: the folder or hub id of the base model.
        store: a folder for rendered rows, by identity, where the next run finds what a killed run has finished.
        batch_size: rows sampled together.
        decode_chunk: frames that the VAE decodes at a time.
        found_in: further results folders whose videos serve too.
        source: the clip that masks and presets read; by default one without caption and frames.
        control: what steers the edits by edges, depth, ...; by default nothing.
        base_identity: the `tav_model.base_models.base_digest` of the base where it is known; otherwise it is computed.
        window: the section `window` of params.yaml; None: no windows.
        adopt: False only looks: the store is left as it is, and nothing may be rendered.
        compile: compile the network.
        vocabulary: of the base model; tells the category of rows that have none.
    """

    def __init__(
        self,
        rows: Sequence[PromptRow],
        inverted: Path,
        tuned: Path,
        out: Path,
        *,
        root: Path,
        base: str,
        attention: AttentionParams,
        params: EditParams,
        seed: int,
        device: str,
        store: Path,
        batch_size: int = 1,
        decode_chunk: int = 8,
        found_in: Sequence[Path] = (),
        source: Source | None = None,
        control: StageControl | None = None,
        base_identity: str | None = None,
        window: WindowParams | None = None,
        adopt: bool = True,
        compile: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.inverted, self.tuned, self.out, self.root, self.store = inverted, tuned, out, root, store
        self.base, self.attention, self.params, self.device = base, attention, params, device
        self.batch_size, self.decode_chunk, self.compile = batch_size, decode_chunk, compile
        self.vocabulary, self.found_in = vocabulary, (out, *found_in)
        self.source = source or Source(root, inverted)
        self.control = control or StageControl(root)
        self._arguments: dict[str, dict[str, Any]] = {}  # of the pipeline, by identity
        self.audio = self.source.audio() if params.audio else None
        self.windows = None
        if window is not None and window.context_length is not None:
            self.windows = window.options(self.num_frames)
        inputs = digest(
            FORMAT,
            inverted / "inverted.safetensors",
            tuned / "tuned.json",
            base_identity or base_digest(base),
            canonical_json(attention.model_dump()),
            params.start,
            params.precision,
            *([canonical_json(asdict(self.windows))] if self.windows else []),
            *(["autoregressive"] if self.is_autoregressive else []),
            *([self.audio] if self.audio else []),
        )
        self.rows = [self._resolve(row, seed, inputs) for row in rows]
        if adopt:
            self._adopt_previous()

    def _resolve(self, row: PromptRow, seed: int, inputs: str) -> EditRow:
        params = self.params
        settings: dict[str, Any] = {
            "prompt": row.prompt,
            "negative_prompt": params.negative_prompt if row.negative_prompt is None else row.negative_prompt,
            "guidance_scale": float(params.guidance_scale if row.guidance_scale is None else row.guidance_scale),
            "steps": params.steps if row.steps is None else row.steps,
            "seed": seed if row.seed is None else row.seed,
        }
        preset, arguments = source_arguments(row, params, self._category(row.prompt))
        parts = [inputs, canonical_json(settings | arguments)]
        if arguments:
            parts.append(self.source.identity(arguments))
        if self.control or row.control_scale is not None:
            parts += ["control", self.control.with_scale(row.control_scale).identity or "missing"]
        identity = digest(*parts)
        self._arguments[identity] = arguments
        return EditRow(
            name=row.name,
            category=row.category,
            identity=identity,
            preset=preset,
            mask=NO_MASK if row.mask == NO_MASK else arguments.get("mask"),
            control_scale=row.control_scale,
            **settings,
        )

    def _category(self, prompt: str) -> str | None:
        """Return the category that the base model's vocabulary gives to an edit, if it has one."""
        if self.vocabulary is None or not self.source.caption:
            return None
        return self.vocabulary.category(self.source.caption, prompt)

    @cached_property
    def num_frames(self) -> int:
        """The number of frames of the clip."""
        return read_shape(self.inverted / "inverted.safetensors", "latents")[2]

    @property
    def is_autoregressive(self) -> bool:
        """Whether windows are sampled one after the other."""
        return self.windows is not None and self.params.autoregressive

    def steps_of(self, row: EditRow) -> int:
        """Return how many sampling steps the row takes."""
        sampled = self._sampled_steps(row)
        if self.windows is None or not self.params.autoregressive:
            return sampled
        return sampled * len(self.windows.windows(self.num_frames))

    def _sampled_steps(self, row: EditRow) -> int:
        """Return how many of the row's steps are sampled.

        Raises:
            TavError: none would be.
        """
        from tav_model.sampling import first_sampled_step

        strength = self._arguments[row.identity].get("strength", 1.0) if self.params.start == "inverted" else 1.0
        try:
            return row.steps - first_sampled_step(strength, row.steps)
        except ValueError as error:
            raise TavError(f"{row.name}: {error}; allowed: above {0.5 / row.steps:.2g}") from None

    # Which rows are done

    def is_done(self, row: EditRow) -> bool:
        """Return whether the row's files are complete in the store."""
        folder = self.store / row.identity
        video = folder / "edit.mp4"
        return video.exists() and read_record(folder / "edit.json").get("video") == digest(video)

    def todo(self) -> list[EditRow]:
        """Return the rows that are not in the store."""
        return [row for row in self.rows if not self.is_done(row)]

    def to_render(self) -> list[EditRow]:
        """Return the rows of `todo` that neither a results folder nor DVC's cache holds."""
        todo = self.todo()
        found = self._previous({row.identity for row in todo}) if todo else {}
        return [row for row in todo if row.identity not in found]

    def _adopt_previous(self) -> None:
        """Copy into the store what an earlier run left in the results, or DVC keeps of it in its cache."""
        todo = self.todo()
        for identity, files in self._previous({row.identity for row in todo}).items() if todo else ():
            with atomic_folder(self.store / identity) as folder:
                for suffix, path in files.items():
                    shutil.copyfile(path, folder / f"edit{suffix}")

    def _previous(self, wanted: set[str]) -> dict[str, dict[str, Path]]:
        """Return the files of rows with these identities that are elsewhere than in the store, by suffix."""
        found = {}
        for results in self.found_in:
            files = previous_output(self.root, results.relative_to(self.root).as_posix())
            files = {**files, **({path.name: path for path in results.glob("*.*")} if results.is_dir() else {})}
            for name, path in files.items():
                stem = name.removesuffix(".json")
                if stem == name or not all(stem + suffix in files for suffix in EDIT_SUFFIXES):
                    continue
                identity = read_record(path).get("identity")
                if identity in wanted:
                    found[identity] = {suffix: files[stem + suffix] for suffix in EDIT_SUFFIXES}
        return found

    # Rendering

    @cached_property
    def pipeline(self) -> TuneAVideoPipeline:
        """The pipeline with the tuned weights, loaded on first use.

        Raises:
            TavError: other weights than those the latents were inverted with, or a base model that cannot be loaded.
        """
        import torch

        from tav_model.tuned_weights import read_info

        # Sampling leads back to the clip only with the weights that its latents were inverted with.
        inverted_with = load_tensors(self.inverted / "inverted.safetensors")[1].get("tuned")
        if inverted_with != read_info(self.tuned)["sha256"]:
            raise TavError(f"{self.tuned}: not the weights that {self.inverted} was inverted with; run dvc repro")
        dtype = getattr(torch, resolve_precision(self.params.precision, self.device))
        spatial, temporal = self.attention.spatial, self.attention.temporal
        with MODEL_LOADING:
            networks = self.control.networks(self.device, dtype)
            pipeline = load_pipeline(self.base, self.tuned, spatial, temporal, self.device, dtype, networks)
        if self.compile:
            from tav_model.compiling import compile_network

            compile_network(pipeline.unet, self.device)
        return pipeline

    def first_group(self, rows: Sequence[EditRow]) -> list[EditRow]:
        """Return the first of the rows, and those of the others that can be sampled in one batch with it."""
        first, *others = rows
        if self.is_autoregressive:
            return [first]
        alike = [row for row in others if row.batch_key == first.batch_key]
        return [first, *alike[: self.batch_size - 1]]

    def render(self, rows: Sequence[EditRow], on_step: OnStep) -> list[EditRow]:
        """Render rows together into the store; returns those rendered, which are fewer where memory does not suffice.

        Args:
            rows: rows that agree in `EditRow.batch_key`.
            on_step: called after each sampling step.
        """
        if self.is_autoregressive:
            self._render_in_order(rows[0], on_step)
            return [rows[0]]
        arguments = self._pipeline_arguments(rows[0])
        (latents, masks), size = retry_with_smaller_batch(
            lambda size: self._sample(rows[:size], arguments, on_step), len(rows), "prompts at a time"
        )
        if size < len(rows):
            self.batch_size = size
        for i, row in enumerate(rows[:size]):
            mask = None if masks is None else masks[i]
            frames = self._decoded(row, latents[i : i + 1], arguments, mask)
            self._store(row, frames, mask)
        return list(rows[:size])

    def _decoded(
        self, row: EditRow, latents: torch.Tensor, arguments: dict[str, Any], mask: torch.Tensor | None, first: int = 0
    ) -> Iterator[np.ndarray]:
        """Yield the frames of latents `1 c f h w`, pasted into the source where there is a mask: `f h w 3` in uint8.

        They are decoded a few at a time, so that a long video need not fit into memory.

        Args:
            row: the row.
            latents: of the frames.
            arguments: what `_pipeline_arguments` returns for it.
            mask: of the latents, `f h w`; None without a mask.
            first: index of the first of the frames.
        """
        import numpy as np

        from tav_model.blending import paste, pixel_masks
        from tav_model.latents import decode_latents, to_frames

        vae, size, settings = self.pipeline.vae, self.decode_chunk, self._arguments[row.identity]
        for start in range(0, latents.shape[2], size):
            part = latents[:, :, start : start + size]
            video, self.decode_chunk = retry_with_smaller_batch(
                partial(decode_latents, vae, part), self.decode_chunk, "frames at a time"
            )
            if is_pasted(settings) and self.source.frames is not None and mask is not None:
                places = slice(first + start, first + start + part.shape[2])
                source = self.source.source_frames()[places].numpy()
                if is_pixel_mask(settings):
                    pixels = arguments["mask"]
                    generated = (pixels if len(pixels) == 1 else pixels[places]) != settings.get("mask_inverted", False)
                else:
                    generated = pixel_masks(mask[start : start + size], self.pipeline.vae_scale_factor)
                video = paste(video, source, np.broadcast_to(generated, source.shape[:3]), settings["mask_feather"])
            yield to_frames(video[0])

    def _render_in_order(self, row: EditRow, on_step: OnStep) -> None:
        """Render a row window by window. Finished windows are kept until the row is done, so that it resumes there."""
        import torch

        from tav.media.growing import GrowingVideo
        from tav_model.autoregressive import edit_autoregressively
        from tav_model.sampling import SAMPLERS
        from tav_model.trajectory import Trajectory

        folder = self.store / f"{row.identity}{PARTIAL}"
        taken_over = self._pipeline_arguments(row)
        latents, arguments = self._first_latents([row], taken_over)
        start = {name: arguments.pop(name) for name in OF_THE_FIRST_LATENTS if name in arguments}
        if latents is None:
            source = Trajectory(arguments["trajectory"], self.pipeline.scheduler)
            schedule = SAMPLERS[self.params.sampler](source.scheduler, row.steps, source.timesteps[-1])
            first = schedule.timesteps[row.steps - self._sampled_steps(row)]
            latents = source.start(timestep=first, **start)
        for name in ("context_length", "context_stride", "context_anchor", "context_weighting"):
            arguments.pop(name)

        def after_step(*_: Any) -> dict[str, Any]:
            on_step([row], 1)
            return {}

        assert self.windows is not None  # noqa: S101 (`is_autoregressive`)
        growing = GrowingVideo(folder, self._fps())
        masks, parts = [], []
        for part in edit_autoregressively(
            self.pipeline,
            [row.prompt],
            latents,
            self.windows,
            folder,
            num_inference_steps=row.steps,
            guidance_scale=row.guidance_scale,
            negative_prompt=[row.negative_prompt],
            callback_on_step_end=after_step,
            **arguments,
        ):
            if part.resumed:
                on_step([row], self._sampled_steps(row))
            if part.start not in growing:
                mask = None if part.masks is None else part.masks[0]
                growing.add(part.start, self._decoded(row, part.latents, taken_over, mask, part.start))
                logger.info("%s: %d of %d frames: %s", row.name, part.stop, latents.shape[2], growing.path)
            parts.append(part.latents)
            masks += [] if part.masks is None else [part.masks[0]]
        # Once more and in one piece, so that the video does not depend on where it was interrupted.
        mask = torch.cat(masks) if masks else None
        self._store(row, self._decoded(row, torch.cat(parts, dim=2), taken_over, mask), mask)
        shutil.rmtree(folder, ignore_errors=True)

    def _fps(self) -> Fraction:
        return Fraction(read_metadata(self.inverted / "inverted.safetensors")["fps"])

    def _sample(
        self, rows: Sequence[EditRow], taken_over: dict[str, Any], on_step: OnStep
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sample the rows' latents, `b c f h w`, and return them with their masks, `b f h w`, if they have any.

        Args:
            rows: to sample together.
            taken_over: what `_pipeline_arguments` returns for them.
            on_step: called after each step.
        """
        latents, arguments = self._first_latents(rows, taken_over)
        steps = 0

        def after_step(*_: Any) -> dict[str, Any]:
            nonlocal steps
            steps += 1
            on_step(rows, 1)
            return {}

        try:
            output = self.pipeline(
                [row.prompt for row in rows],
                latents=latents,
                num_inference_steps=rows[0].steps,
                guidance_scale=rows[0].guidance_scale,
                negative_prompt=[row.negative_prompt for row in rows],
                output_type="latent",
                callback_on_step_end=after_step,
                **arguments,
            )
            return output.frames, output.masks
        except Exception:
            if steps:
                on_step(rows, -steps)  # They are done again, in a smaller batch.
            raise

    def _first_latents(
        self, rows: Sequence[EditRow], taken_over: dict[str, Any]
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Return the latents that sampling starts from, None where they come from the trajectory, and other arguments."""
        import torch

        tensors, metadata = load_tensors(self.inverted / "inverted.safetensors")
        latents: torch.Tensor | None = tensors["latents"]
        arguments = dict(taken_over)
        if self.params.start == "inverted":
            arguments["num_inversion_steps"] = int(metadata["steps"])
            if any(name in arguments for name in (*OF_THE_FIRST_LATENTS, "strength")):
                latents = None
        else:
            for name in (*OF_THE_FIRST_LATENTS, "strength", "fresh_noise"):
                arguments.pop(name, None)
            noise = [
                torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(row.seed)) for row in rows
            ]
            latents = torch.cat(noise)
        if "fresh_noise" in arguments:
            arguments["fresh_noise_seed"] = [row.seed for row in rows]
        return latents, arguments

    def _pipeline_arguments(self, row: EditRow) -> dict[str, Any]:
        """Return the arguments that take something over from the source, or control the edit, with what they read.

        Raises:
            TavError: the row sets a control scale, but the clip has no control.
        """
        if row.control_scale is not None and not self.control:
            raise TavError("control_scale: the clip has no control; set it in params.yaml")
        arguments = self._arguments[row.identity] | self.control.with_scale(row.control_scale).arguments()
        if self.windows is not None:
            arguments |= {
                "context_length": self.windows.context_length,
                "context_stride": self.windows.context_stride,
                "context_anchor": self.windows.anchor,
                "context_weighting": self.windows.weighting,
            }
        if uses_caption(arguments):
            arguments["source_prompt"] = self.source.caption
        if is_pixel_mask(arguments):
            mask = self.source.pixel_mask(arguments["mask"])
            arguments["mask"] = mask.copy() if mask.strides[0] else mask[:1].copy()  # Of a still image, one is enough.
        arguments.pop("mask_feather", None)
        if uses_trajectory(arguments):
            arguments["trajectory"] = self.source.trajectory()
        return arguments

    def _store(self, row: EditRow, parts: Iterator[np.ndarray], mask: torch.Tensor | None = None) -> None:
        """Write the files of a row, from its frames part by part."""
        from tav.media.videos import Preview
        from tav_model.video import video_writer

        fps = self._fps()
        preview = Preview(self.num_frames, fps)
        with atomic_folder(self.store / row.identity) as folder:
            with video_writer(folder / "edit.mp4", fps, self.audio) as video:
                for frames in parts:
                    video.write(frames)
                    preview.add(frames)
            preview.write(folder / "edit.webp")
            record = {
                "name": row.name,
                "prompt": row.prompt,
                "category": row.category,
                "negative_prompt": row.negative_prompt,
                "guidance_scale": row.guidance_scale,
                "steps": row.steps,
                "seed": row.seed,
                "preset": row.preset,
                "mask": row.mask,
                **self._mask_record(row, mask),
                **self._control_record(row),
                "identity": row.identity,
                "frames": self.num_frames,
                "height": frames.shape[1],
                "width": frames.shape[2],
                "fps": str(fps),
                "video": digest(folder / "edit.mp4"),
            }
            write_json(folder / "edit.json", record)

    def _mask_record(self, row: EditRow, mask: torch.Tensor | None) -> dict[str, Any]:
        """Return what the record says of the mask: its settings, and a picture of it in the middle frame."""
        if mask is None:
            return {}
        arguments = self._arguments[row.identity]
        settings = {name: arguments[name] for name in MASK_SETTINGS if name in arguments}
        if not mask.any():
            reasons = {
                DIFFERENCE: f"the model sees no change in {row.prompt!r}; lower edit.difference_threshold",
                WORDS: f"the model sees nothing of the words that are new in {row.prompt!r}; lower edit.mask_threshold",
            }
            reason = reasons.get(row.mask or "", "it is white" if settings.get("mask_inverted") else "it is black")
            logger.warning(
                "%s: nothing is in the mask %r, so that the video is the clip's: %s", row.name, row.mask, reason
            )
        return {**settings, "mask_image": mask_image(mask[len(mask) // 2].cpu().numpy())}

    def _control_record(self, row: EditRow) -> dict[str, Any]:
        """Return what the record says of the control: the networks, and the row's own scale; nothing without control."""
        if not self.control:
            return {}
        own = {} if row.control_scale is None else {"control_scale": row.control_scale}
        return {"control": self.control.with_scale(row.control_scale).summary, **own}

    # The results folder

    def publish(self, failed: dict[str, str]) -> None:
        """Copy the files of all rows under their names into `out`, and drop from the store rows that the CSV lacks.

        Args:
            failed: the reasons of the rows that could not be rendered, by name.

        Raises:
            TavError: rows have failed. The others stay in the store, and only the failed ones are rendered next time.
        """
        if failed:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
            done = len(self.rows) - len(failed)
            raise TavError(f"edit: {len(failed)} of {len(self.rows)} rows failed: {reasons}. {done} done and kept")
        with atomic_folder(self.out) as folder:
            for row in self.rows:
                source = self.store / row.identity
                for suffix in (".mp4", ".webp"):
                    shutil.copyfile(source / f"edit{suffix}", folder / f"{row.name}{suffix}")
                record = read_json(source / "edit.json")
                # A row that was only renamed, or put into another category, keeps its video.
                write_json(folder / f"{row.name}.json", record | {"name": row.name, "category": row.category})
        wanted = {row.identity for row in self.rows}
        for path in self.store.iterdir():
            if path.name.removesuffix(PARTIAL) not in wanted:
                shutil.rmtree(path)


def render_rows(
    batch: RowBatch, rows: Sequence[EditRow], events: EventStream, clip: str = "", progress: Progress | None = None
) -> Iterator[RowResult]:
    """Render rows one batch after the other, and yield what became of each as soon as it is known.

    Rows that are in the store already are yielded first. A row that fails fails alone: where a batch of several fails,
    its rows are rendered one by one.

    Args:
        batch: the rows of the clip, with their store.
        rows: those of them to render.
        events: receives the progress of each row, and `RowFinished`.
        clip: the clip's name, for events.
        progress: counts the steps of all rows together.

    Raises:
        TavError: the model cannot be loaded, which is no fault of a row.
        FullDiskError: the disk is full, which is no fault of a row either; what is done stays in the store.
    """
    alike: dict[str, list[EditRow]] = {}  # Rows that differ in their names only have one video.
    for row in rows:
        if batch.is_done(row):
            yield RowResult(row)
        else:
            alike.setdefault(row.identity, []).append(row)
    waiting = [same[0] for same in alike.values()]
    if waiting:
        batch.pipeline  # noqa: B018 (loaded here, outside of what counts as a row's failure)
    groups: list[list[EditRow]] = []
    while waiting or groups:
        group = groups.pop(0) if groups else batch.first_group(waiting)
        waiting = [row for row in waiting if row not in group]
        loops = {
            row.name: Progress(events, stage="edit", clip=clip, row=row.name, total=batch.steps_of(row))
            for row in group
        }

        def on_step(rows: Sequence[EditRow], steps: int, loops: dict[str, Progress] = loops) -> None:
            if progress is not None:
                progress.update(steps * len(rows))
            for row in rows:
                loops[row.name].update(steps)

        try:
            rendered = batch.render(group, on_step)
        except FullDiskError:
            raise
        except Exception as error:
            if len(group) > 1:
                groups = [[row] for row in group] + groups
                continue
            logger.exception("row %s failed", group[0].name)
            for row in alike[group[0].identity]:
                yield RowResult(row, error=first_line(error))
            continue
        for row in (same for one in rendered for same in alike[one.identity]):
            events.publish(RowFinished(clip=clip, stage="edit", row=row.name, edit=row))
            yield RowResult(row, rendered=True)
        waiting = [row for row in group if row not in rendered] + waiting
