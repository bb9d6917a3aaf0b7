"""Edit: one video for each row of a prompt CSV, from the clip's inverted latents.

A row is the unit of work. Its identity is a digest of everything that its video depends on; rows that were rendered
before, and whose files are still somewhere, are not rendered again, and a row that fails fails alone.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav.config import AttentionParams, EditParams
from tav.config.prompts import EditRow, PromptRow
from tav.config.results import EDIT_SUFFIXES, read_record
from tav.runtime.devices import retry_with_smaller_batch
from tav.versioning.cache_lookup import previous_output
from tav_model.base_models import base_digest, load_pipeline
from tav_model.digests import canonical_json, digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, read_json, write_json
from tav_model.tensors import load_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tav_model import TuneAVideoPipeline

logger = logging.getLogger(__name__)

# Part of every identity: a change of the files that a row leaves asks for new ones.
FORMAT = "2"


class RowBatch:
    """The edits of one clip: which are done, how to render one, and the results folder of them all.

    Args:
        store: a folder for rendered rows, by identity; what a killed run has finished is found there.
        batch_size: edits sampled together. A batch is rendered when the first of its edits is asked for.
        found_in: further results folders, whose videos serve too.
        base_identity: what `tav_model.base_models.base_digest` says of the base, where that is known; else it is read.
        adopt: False: only look. The store is left as it is, and nothing may be rendered.
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
        base_identity: str | None = None,
        adopt: bool = True,
    ) -> None:
        self.inverted, self.tuned, self.out, self.root, self.store = inverted, tuned, out, root, store
        self.base, self.attention, self.params, self.device = base, attention, params, device
        self.batch_size, self.decode_chunk = batch_size, decode_chunk
        self.found_in = (out, *found_in)
        base_identity = base_identity or base_digest(base)
        inputs = digest(
            FORMAT,
            inverted,
            tuned / "tuned.json",
            base_identity,
            canonical_json(attention.model_dump()),
            params.start,
            params.precision,
        )
        self.edits = [self._fill_in(row, seed, inputs) for row in rows]
        self._frames: dict[str, np.ndarray] = {}
        if adopt:
            self._adopt_previous()

    def _fill_in(self, row: PromptRow, seed: int, inputs: str) -> EditRow:
        params = self.params
        settings: dict[str, Any] = {
            "prompt": row.prompt,
            "negative_prompt": params.negative_prompt if row.negative_prompt is None else row.negative_prompt,
            "guidance_scale": float(params.guidance_scale if row.guidance_scale is None else row.guidance_scale),
            "steps": params.steps if row.steps is None else row.steps,
            "seed": seed if row.seed is None else row.seed,
        }
        identity = digest(inputs, canonical_json(settings))
        return EditRow(name=row.name, category=row.category, identity=identity, **settings)

    # What is done

    def is_done(self, edit: EditRow) -> bool:
        """Whether the edit's files are in the store, whole."""
        folder = self.store / edit.identity
        video = folder / "edit.mp4"
        return video.exists() and read_record(folder / "edit.json").get("video") == digest(video)

    def todo(self) -> list[EditRow]:
        return [edit for edit in self.edits if not self.is_done(edit)]

    def to_render(self) -> list[EditRow]:
        """Those of `todo` that no results folder has either, nor DVC's cache."""
        todo = self.todo()
        found = self._previous({edit.identity for edit in todo}) if todo else {}
        return [edit for edit in todo if edit.identity not in found]

    def _adopt_previous(self) -> None:
        """Put into the store what an earlier run left in the results, or what DVC keeps of it in its cache."""
        todo = self.todo()
        for identity, files in self._previous({edit.identity for edit in todo}).items() if todo else ():
            with atomic_folder(self.store / identity) as folder:
                for suffix, path in files.items():
                    shutil.copyfile(path, folder / f"edit{suffix}")

    def _previous(self, wanted: set[str]) -> dict[str, dict[str, Path]]:
        """The files of edits with these identities, by suffix, that lie elsewhere than in the store."""
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
        import torch

        from tav_model.tuned_weights import read_info

        # The latents lead back to the clip with the weights that they were inverted with, and with no others.
        with_weights = load_tensors(self.inverted / "inverted.safetensors")[1].get("tuned")
        if with_weights != read_info(self.tuned)["sha256"]:
            raise TavError(f"{self.tuned}: not the weights that {self.inverted} was inverted with; run dvc repro")
        dtype = getattr(torch, self.params.precision)
        return load_pipeline(self.base, self.tuned, self.attention.spatial, self.attention.temporal, self.device, dtype)

    def render(self, edit: EditRow, on_step: Callable[[int], None] | None = None) -> None:
        """Render the edit into the store (with the rest of its batch in memory, until they are asked for)."""
        from tav.media.videos import write_mp4, write_preview

        if edit.identity not in self._frames:
            self._render_batch(self._batch_of(edit), on_step)
        frames = self._frames.pop(edit.identity)
        fps = Fraction(load_tensors(self.inverted / "inverted.safetensors")[1]["fps"])
        with atomic_folder(self.store / edit.identity) as folder:
            write_mp4(folder / "edit.mp4", frames, fps)
            write_preview(folder / "edit.webp", frames, fps)
            record = {
                "name": edit.name,
                "prompt": edit.prompt,
                "category": edit.category,
                "negative_prompt": edit.negative_prompt,
                "guidance_scale": edit.guidance_scale,
                "steps": edit.steps,
                "seed": edit.seed,
                "identity": edit.identity,
                "frames": len(frames),
                "height": frames.shape[1],
                "width": frames.shape[2],
                "fps": str(fps),
                "video": digest(folder / "edit.mp4"),
            }
            write_json(folder / "edit.json", record)

    def _batch_of(self, edit: EditRow) -> list[EditRow]:
        # From here on and around, and only as far as the batch needs: to look whether an edit is done reads its video.
        place = self.edits.index(edit)
        others = (
            other for other in (*self.edits[place + 1 :], *self.edits[:place]) if other.batch_key == edit.batch_key
        )
        waiting = (other for other in others if not self.is_done(other))
        return [edit, *islice(waiting, self.batch_size - 1)]

    def _render_batch(self, edits: list[EditRow], on_step: Callable[[int], None] | None) -> None:
        """The frames of the edits, or of fewer where memory does not suffice; the rest is asked for later."""
        from tav_model.latents import decode_latents, to_frames

        latents, size = retry_with_smaller_batch(
            lambda size: self._sample(edits[:size], on_step), len(edits), "prompts at a time"
        )
        if size < len(edits):
            self.batch_size = size
        vae = self.pipeline.vae
        video, self.decode_chunk = retry_with_smaller_batch(
            lambda chunk: decode_latents(vae, latents, chunk), self.decode_chunk, "frames at a time"
        )
        self._frames |= {edit.identity: to_frames(one) for edit, one in zip(edits[:size], video, strict=True)}

    def _sample(self, edits: list[EditRow], on_step: Callable[[int], None] | None) -> torch.Tensor:
        """The edits' latents, `b c f h w`."""
        import torch

        latents = load_tensors(self.inverted / "inverted.safetensors")[0]["latents"]
        if self.params.start == "random":
            noise = [torch.randn(latents.shape, generator=torch.Generator().manual_seed(e.seed)) for e in edits]
            latents = torch.cat(noise)

        def after_step(*_: Any) -> dict:
            if on_step is not None:
                on_step(len(edits))
            return {}

        return self.pipeline(
            [edit.prompt for edit in edits],
            latents=latents,
            num_inference_steps=edits[0].steps,
            guidance_scale=edits[0].guidance_scale,
            negative_prompt=[edit.negative_prompt for edit in edits],
            output_type="latent",
            callback_on_step_end=after_step,
        ).frames

    # The results folder

    def finish(self, failed: dict[str, str]) -> None:
        """Put the files of all rows under their names into `out`, and drop from the store what the CSV no longer asks for.

        Args:
            failed: names of the edits that could not be rendered, with the reason.

        Raises:
            TavError: some have failed; the others stay in the store, and only the failed ones are rendered next time.
        """
        if failed:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
            done = len(self.edits) - len(failed)
            raise TavError(f"edit: {len(failed)} of {len(self.edits)} rows failed: {reasons}. {done} done and kept")
        with atomic_folder(self.out) as folder:
            for edit in self.edits:
                source = self.store / edit.identity
                for suffix in (".mp4", ".webp"):
                    shutil.copyfile(source / f"edit{suffix}", folder / f"{edit.name}{suffix}")
                record = read_json(source / "edit.json")
                # A row that was only renamed or put into another category keeps its video.
                write_json(folder / f"{edit.name}.json", record | {"name": edit.name, "category": edit.category})
        wanted = {edit.identity for edit in self.edits}
        for path in self.store.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path)
