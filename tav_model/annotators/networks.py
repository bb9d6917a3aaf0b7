"""Depth, poses and segmentation of frames by models of transformers, from a folder or the hub."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tav_model.annotators.ade20k import ADE20K
from tav_model.annotators.skeleton import draw_people, openpose_joints
from tav_model.errors import TavError
from tav_model.weight_checks import check_files, check_loaded, quiet, reason

# Models that estimate distances; the others estimate how near something is, as the control networks expect.
METRIC_DEPTH = ("depth_pro", "glpn", "prompt_depth_anything", "zoedepth")
# Weights that DPT has but does not use, and published files do not contain.
UNUSED = re.compile(r"fusion_stage\.layers\.0\.residual_layer1\.")
COCO_KEYPOINTS = 17
PERSON_SCORE, JOINT_SCORE = 0.5, 0.3


@torch.no_grad()
def depth(
    frames: np.ndarray,
    model: str | Path,
    device: str = "cpu",
    chunk_size: int = 8,
    on_chunk: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return how near each pixel is, from black to white, as `f h w 3` in uint8.

    The nearest and the farthest pixel are those of all frames, so that the depth does not flicker.

    Args:
        frames: `f h w 3` in uint8.
        model: folder or hub id of a model for `AutoModelForDepthEstimation`, such as Depth Anything or DPT.
        device: where it runs.
        chunk_size: frames that it sees at a time.
        on_chunk: called after each chunk with its number of frames.

    Raises:
        TavError: there is no such model, or its depth is not finite.
    """
    network, processor = _load("AutoModelForDepthEstimation", model, device)
    post_process = processor.post_process_depth_estimation
    parts = []
    for chunk in _chunks(frames, chunk_size, on_chunk):
        outputs = network(**processor(images=list(chunk), return_tensors="pt").to(device))
        size = chunk.shape[1:3]
        sizes = {"target_sizes": [size] * len(chunk)}
        if "source_sizes" in inspect.signature(post_process).parameters:  # The model has padded the frames.
            sizes["source_sizes"] = [size] * len(chunk)
        results = post_process(outputs, **sizes)
        parts += [result["predicted_depth"].float().cpu().numpy() for result in results]
    near = np.stack(parts)
    config = network.config
    if config.model_type in METRIC_DEPTH or getattr(config, "depth_estimation_type", "relative") == "metric":
        near = 1 / np.maximum(near, 1e-3)
    if not np.isfinite(near).all():
        raise TavError(f"{model}: the depth is not finite")
    low, high = float(near.min()), float(near.max())
    grey = (near - low) / max(high - low, 1e-12)
    return np.repeat(np.rint(255 * grey).astype(np.uint8)[..., None], 3, axis=-1)


@torch.no_grad()
def pose(
    frames: np.ndarray,
    model: str | Path,
    detector: str | Path | None = None,
    device: str = "cpu",
    chunk_size: int = 8,
    on_chunk: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return the skeletons of the people in each frame, as OpenPose draws them, `f h w 3` in uint8.

    Args:
        frames: `f h w 3` in uint8.
        model: folder or hub id of a ViTPose model with the 17 keypoints of COCO.
        detector: folder or hub id of a model for `AutoModelForObjectDetection` that finds the people. Without one, each
            frame is taken to show one person.
        device: where the models run.
        chunk_size: frames that they see at a time.
        on_chunk: called after each chunk with its number of frames.

    Raises:
        TavError: there is no such model, or it has other keypoints, or the detector knows no people.
    """
    network, processor = _load("VitPoseForPoseEstimation", model, device)
    if network.config.num_labels != COCO_KEYPOINTS:
        raise TavError(f"{model}: has {network.config.num_labels} keypoints, not the {COCO_KEYPOINTS} of COCO")
    find = _person_finder(detector, device)
    experts = getattr(network.config.backbone_config, "num_experts", 1) > 1
    pictures = []
    for chunk in _chunks(frames, chunk_size, on_chunk):
        height, width = chunk.shape[1:3]
        boxes = find(chunk)
        people: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in chunk]
        seen = [place for place, found in enumerate(boxes) if found]
        if seen:
            found = [boxes[place] for place in seen]
            inputs = processor(images=[chunk[place] for place in seen], boxes=found, return_tensors="pt").to(device)
            if experts:  # The first is the one of COCO.
                inputs["dataset_index"] = torch.zeros(len(inputs["pixel_values"]), dtype=torch.int64, device=device)
            poses = processor.post_process_pose_estimation(network(**inputs), boxes=found)
            for place, results in zip(seen, poses, strict=True):
                people[place] = [
                    openpose_joints(one["keypoints"].numpy(), one["scores"].reshape(-1).numpy()) for one in results
                ]
        pictures += [draw_people(one, height, width, JOINT_SCORE) for one in people]
    return np.stack(pictures)


@torch.no_grad()
def segmentation(
    frames: np.ndarray,
    model: str | Path,
    device: str = "cpu",
    chunk_size: int = 8,
    on_chunk: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return the classes of ADE20K in each frame, in its colours, as `f h w 3` in uint8.

    Args:
        frames: `f h w 3` in uint8.
        model: folder or hub id of a model for `AutoModelForSemanticSegmentation` with the 150 classes of ADE20K, such as
            UPerNet or SegFormer.
        device: where it runs.
        chunk_size: frames that it sees at a time.
        on_chunk: called after each chunk with its number of frames.

    Raises:
        TavError: there is no such model, or it has other classes.
    """
    network, processor = _load("AutoModelForSemanticSegmentation", model, device)
    if network.config.num_labels != len(ADE20K):
        raise TavError(f"{model}: has {network.config.num_labels} classes, not the {len(ADE20K)} of ADE20K")
    pictures = []
    for chunk in _chunks(frames, chunk_size, on_chunk):
        logits = network(**processor(images=list(chunk), return_tensors="pt").to(device)).logits
        for one in logits:  # One at a time: 150 maps of a frame's size are large.
            resized = functional.interpolate(one[None].float(), size=chunk.shape[1:3], mode="bilinear")
            pictures.append(ADE20K[resized[0].argmax(0).cpu().numpy()])
    return np.stack(pictures)


def _chunks(frames: np.ndarray, size: int, on_chunk: Callable[[int], None] | None) -> Iterator[np.ndarray]:
    if size < 1:
        raise ValueError(f"chunk_size: {size} must be at least 1")
    for first in range(0, len(frames), size):
        chunk = frames[first : first + size]
        yield chunk
        if on_chunk is not None:
            on_chunk(len(chunk))


def _person_finder(detector: str | Path | None, device: str) -> Callable[[np.ndarray], list[list[list[float]]]]:
    """Return a function that returns the boxes (x, y, width, height) of the people in each frame."""
    if detector is None:
        return lambda chunk: [[[0.0, 0.0, float(frame.shape[1]), float(frame.shape[0])]] for frame in chunk]
    network, processor = _load("AutoModelForObjectDetection", detector, device)
    people = [label for label, name in network.config.id2label.items() if name == "person"]
    if not people:
        raise TavError(f"{detector}: detects no class 'person'")

    def find(chunk: np.ndarray) -> list[list[list[float]]]:
        outputs = network(**processor(images=list(chunk), return_tensors="pt").to(device))
        sizes = [chunk.shape[1:3]] * len(chunk)
        boxes: list[list[list[float]]] = []
        for result in processor.post_process_object_detection(outputs, threshold=PERSON_SCORE, target_sizes=sizes):
            chosen = [int(label) in people for label in result["labels"]]
            corners = result["boxes"].cpu()[torch.tensor(chosen, dtype=torch.bool)].tolist()
            boxes.append([[left, top, right - left, bottom - top] for left, top, right, bottom in corners])
        return boxes

    return find


def _load(kind: str, path: str | Path, device: str) -> tuple[Any, Any]:
    """Return a model of transformers in eval mode, and its image processor.

    Raises:
        TavError: there is no such model, or weights of it are missing, of another shape or not finite.
    """
    import transformers

    kwargs: dict[str, Any] = {"local_files_only": True} if Path(path).exists() else {}
    check_files(path)
    try:
        with quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(path, **kwargs)
            network, loading = getattr(transformers, kind).from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except Exception as error:  # Damaged files make the libraries raise errors of any type.
        what = {"VitPoseForPoseEstimation": "ViTPose model"}.get(kind, f"model for {kind}")
        raise TavError(f"{path}: no {what} can be loaded from it ({reason(error)})") from error
    # Weights that are not needed, such as heads for training, do no harm.
    missing = [name for name in loading["missing_keys"] if not UNUSED.search(name)]
    check_loaded(str(path), network, {**loading, "missing_keys": missing, "unexpected_keys": []})
    return network.eval().to(device), processor
