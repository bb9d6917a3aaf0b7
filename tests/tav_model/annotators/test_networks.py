"""Depth, poses and segmentation by small models with random weights, in folders as they are published."""

import numpy as np
import pytest
import torch
import transformers

from tav_model.annotators.ade20k import ADE20K
from tav_model.annotators.networks import depth, pose, segmentation
from tav_model.annotators.skeleton import draw_people, openpose_joints
from tav_model.errors import TavError

# From dark to light.
FRAMES = np.stack([np.random.default_rng(i).integers(0, 50 * i + 50, (40, 56, 3), np.uint8) for i in range(5)])
VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 4}


def write(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="module")
def dpt(tmp_path_factory):
    config = transformers.DPTConfig(
        **VIT,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    model = seeded(lambda: transformers.DPTForDepthEstimation(config))
    model.head.head[-2].bias.data.fill_(0.5)  # Otherwise its last rectifier leaves nothing.
    for parameter in model.parameters():  # Otherwise all frames have nearly the same depth.
        parameter.data *= 4 if parameter.ndim > 1 else 1
    processor = transformers.DPTImageProcessorPil(size={"height": 32, "width": 32})
    return write(tmp_path_factory.mktemp("dpt"), model, processor)


@pytest.fixture(scope="module")
def metric_depth(tmp_path_factory):
    backbone = transformers.Dinov2Config(
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=4,
        image_size=28,
        patch_size=14,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        reassemble_hidden_size=16,
        patch_size=14,
        depth_estimation_type="metric",
        max_depth=20,
    )
    model = seeded(lambda: transformers.DepthAnythingForDepthEstimation(config))
    processor = transformers.DPTImageProcessorPil(size={"height": 28, "width": 28})
    return write(tmp_path_factory.mktemp("depth-anything"), model, processor)


def depths(folder):
    """The depth of each frame by transformers' own pipeline."""
    from PIL import Image

    estimate = transformers.pipeline("depth-estimation", model=str(folder))
    return np.stack([estimate(Image.fromarray(frame))["predicted_depth"].numpy() for frame in FRAMES])


def test_depth_is_that_of_the_model_from_the_farthest_to_the_nearest_of_all_frames(dpt):
    condition, near = depth(FRAMES, dpt), depths(dpt)
    expected = 255 * (near - near.min()) / (near.max() - near.min())
    assert condition.shape == FRAMES.shape and condition.dtype == np.uint8
    assert np.abs(condition[..., 0] - expected).max() <= 1
    assert condition.min() == 0 and condition.max() == 255
    assert min(frame.max() for frame in condition) < 255, "scaled frame by frame"


def test_metric_depth_is_turned_into_nearness(metric_depth):
    condition, far = depth(FRAMES, metric_depth), depths(metric_depth)
    assert condition[..., 0].flat[far.argmin()] == 255 and condition[..., 0].flat[far.argmax()] == 0
    expected = 255 * (1 / far - 1 / far.max()) / (1 / far.min() - 1 / far.max())
    assert np.abs(condition[..., 0] - expected).max() <= 1


def test_chunks_agree_and_are_counted(dpt):
    counts = []
    assert np.abs(depth(FRAMES, dpt, chunk_size=2, on_chunk=counts.append).astype(int) - depth(FRAMES, dpt)).max() <= 1
    assert counts == [2, 2, 1]


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    return write_segformer(tmp_path_factory.mktemp("segformer"), 150)


def write_segformer(folder, classes):
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8],
        depths=[1] * 4,
        num_attention_heads=[1] * 4,
        decoder_hidden_size=8,
        num_labels=classes,
    )
    model = seeded(lambda: transformers.SegformerForSemanticSegmentation(config))
    return write(folder, model, transformers.SegformerImageProcessorPil(size={"height": 32, "width": 32}))


def test_segmentation_has_the_colours_of_the_classes(segformer):
    condition = segmentation(FRAMES, segformer, chunk_size=3)
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(segformer).eval()
    processor = transformers.SegformerImageProcessorPil.from_pretrained(segformer)
    with torch.no_grad():
        outputs = model(**processor(list(FRAMES), return_tensors="pt"))
    classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[FRAMES.shape[1:3]] * len(FRAMES))
    classes = np.stack([one.numpy() for one in classes])
    assert len(np.unique(classes)) > 1
    assert np.array_equal(condition, ADE20K[classes])


def test_the_palette_is_that_of_the_published_network():
    assert ADE20K.shape == (150, 3)
    known = {0: (120, 120, 120), 2: (6, 230, 230), 4: (4, 200, 3), 12: (150, 5, 61), 149: (92, 0, 255)}
    assert {place: tuple(map(int, ADE20K[place])) for place in known} == known


def write_vitpose(folder, keypoints=17, sure=1.0, experts=1):
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[64, 48],
        patch_size=[16, 16],
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_experts=experts,
        part_features=4,
        out_indices=[2],
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=keypoints)
    model = seeded(lambda: transformers.VitPoseForPoseEstimation(config))
    model.head.conv.weight.data *= 20
    model.head.conv.bias.data.fill_(sure)
    processor = transformers.VitPoseImageProcessorPil(size={"height": 64, "width": 48})
    return write(folder, model, processor)


@pytest.fixture(scope="module")
def vitpose(tmp_path_factory):
    return write_vitpose(tmp_path_factory.mktemp("vitpose"))


def skeletons(folder, boxes):
    """The skeletons of the people in boxes (x, y, width, height), one frame after the other."""
    model = transformers.VitPoseForPoseEstimation.from_pretrained(folder).eval()
    processor = transformers.VitPoseImageProcessorPil.from_pretrained(folder)
    pictures = []
    for frame, people in zip(FRAMES, boxes, strict=True):
        with torch.no_grad():
            outputs = model(**processor(frame, boxes=[people], return_tensors="pt"))
        (found,) = processor.post_process_pose_estimation(outputs, boxes=[people])
        joints = [openpose_joints(one["keypoints"].numpy(), one["scores"].numpy().reshape(-1)) for one in found]
        pictures.append(draw_people(joints, *FRAMES.shape[1:3], 0.3))
    return np.stack(pictures)


def test_without_a_detector_each_frame_shows_one_person(vitpose):
    condition = pose(FRAMES, vitpose, chunk_size=2)
    expected = skeletons(vitpose, [[[0, 0, 56, 40]]] * len(FRAMES))
    assert expected.any(axis=(1, 2, 3)).all()
    assert (condition != expected).mean() < 0.01  # A joint may be rounded to the next pixel.


def test_unsure_joints_are_not_drawn(tmp_path):
    assert not pose(FRAMES, write_vitpose(tmp_path, sure=-50.0)).any()


def test_a_model_with_experts_runs(tmp_path):
    assert pose(FRAMES[:2], write_vitpose(tmp_path, experts=6)).any()


def write_detector(folder, person, name="person"):
    """A detector that takes each of its three boxes for a person, or none."""
    config = transformers.YolosConfig(
        **VIT, image_size=[32, 32], patch_size=16, num_detection_tokens=3, id2label={0: "dog", 1: name}
    )
    model = seeded(lambda: transformers.YolosForObjectDetection(config))
    model.class_labels_classifier.layers[-1].bias.data.copy_(torch.tensor([0.0, 9.0 if person else -9.0, 0.0]))
    processor = transformers.YolosImageProcessorPil(size={"height": 32, "width": 32})
    return write(folder, model, processor)


def test_people_are_found_by_the_detector(tmp_path, vitpose):
    detector = write_detector(tmp_path, person=True)
    model = transformers.YolosForObjectDetection.from_pretrained(detector).eval()
    processor = transformers.YolosImageProcessorPil.from_pretrained(detector)
    with torch.no_grad():
        outputs = model(**processor(list(FRAMES), return_tensors="pt"))
    boxes = []
    for (centre_x, centre_y, width, height), *others in outputs.pred_boxes.tolist():
        rows = [(centre_x, centre_y, width, height), *others]
        boxes.append([[56 * (x - w / 2), 40 * (y - h / 2), 56 * w, 40 * h] for x, y, w, h in rows])
    expected = skeletons(vitpose, boxes)
    condition = pose(FRAMES, vitpose, detector, chunk_size=3)
    assert expected.any() and (condition != expected).any(-1).mean() < 0.05
    assert not np.array_equal(condition, pose(FRAMES, vitpose))


def test_frames_without_people_are_black(tmp_path, vitpose):
    assert not pose(FRAMES, vitpose, write_detector(tmp_path, person=False)).any()


# Errors


def test_models_of_another_kind_are_one_line(tmp_path, dpt, segformer, vitpose):
    cases = [
        (depth, (segformer,), "no model for AutoModelForDepthEstimation"),
        (segmentation, (vitpose,), "no model for AutoModelForSemanticSegmentation"),
        (depth, (tmp_path,), "no model for AutoModelForDepthEstimation"),
        (depth, ("models/depth",), "models/depth: no model"),
        (segmentation, (write_segformer(tmp_path / "cityscapes", 19),), "has 19 classes, not the 150 of ADE20K"),
        (pose, (write_vitpose(tmp_path / "hands", keypoints=21),), "has 21 keypoints, not the 17 of COCO"),
        (pose, (vitpose, write_detector(tmp_path / "dogs", True, "cat")), "detects no class 'person'"),
    ]
    for annotator, arguments, message in cases:
        with pytest.raises(TavError, match=message) as error:
            annotator(FRAMES, *arguments)
        assert "\n" not in str(error.value)


def test_missing_weights_are_refused_but_those_that_published_files_lack(tmp_path, dpt):
    from safetensors.torch import load_file, save_file

    tensors = load_file(dpt / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((dpt / name).read_bytes())
    unused = "fusion_stage.layers.0.residual_layer1"
    assert any(unused in name for name in tensors)
    published = {name: tensor for name, tensor in tensors.items() if unused not in name}
    save_file(published, tmp_path / "model.safetensors", {"format": "pt"})
    assert np.array_equal(depth(FRAMES, tmp_path), depth(FRAMES, dpt))
    lost = next(name for name in published if "head" in name)
    save_file({n: t for n, t in published.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TavError, match=f"no weights for {lost}"):
        depth(FRAMES, tmp_path)
