"""Skeletons: the joints of COCO at their places in OpenPose's order, in its colours."""

import numpy as np

from tav_model.annotators.skeleton import COLOURS, FROM_COCO, LIMBS, NECK, draw_people, openpose_joints

# COCO: nose, left eye, right eye, left ear, right ear, left shoulder, ...
STANDING = np.array(
    [
        *((256, 60), (270, 50), (242, 50), (285, 60), (227, 60), (310, 130), (202, 130), (330, 210), (182, 210)),
        *((340, 290), (172, 290), (290, 300), (222, 300), (295, 390), (217, 390), (298, 480), (214, 480)),
    ],
    float,
)
SURE = np.ones(17)


def test_the_neck_is_between_the_shoulders():
    scores = SURE.copy()
    scores[6] = 0.2
    joints, sure = openpose_joints(STANDING, scores)
    assert joints.shape == (18, 2) and joints[NECK].tolist() == [256, 130]
    assert sure[NECK] == 0.2 and sure[2] == 0.2 and sure[5] == 1
    # OpenPose: right shoulder, right elbow, right wrist, then the left ones.
    assert np.array_equal(joints[[2, 3, 4, 5, 6, 7]], STANDING[[6, 8, 10, 5, 7, 9]])
    assert sorted(FROM_COCO) == [-1, *range(17)]


def test_joints_and_limbs_have_their_colours():
    joints, sure = openpose_joints(STANDING, SURE)
    picture = draw_people([(joints, sure)], 512, 512, 0.3)
    for (x, y), colour in zip(joints.astype(int), COLOURS, strict=True):
        assert tuple(picture[y, x]) == colour
    for (start, end), colour in zip(LIMBS[:12], COLOURS, strict=False):
        x, y = joints[[start, end]].mean(0).astype(int)
        assert tuple(picture[y, x]) == tuple(int(0.6 * value) for value in colour)
    assert 0.01 < picture.any(-1).mean() < 0.1


def test_joints_that_are_not_sure_are_left_out():
    joints, sure = openpose_joints(STANDING, SURE)
    sure[4] = 0.1  # The right wrist, and with it the forearm.
    picture = draw_people([(joints, sure)], 512, 512, 0.3)
    whole = draw_people([(joints, np.ones(18))], 512, 512, 0.3)
    x, y = joints[4].astype(int)
    assert not picture[y, x].any() and whole[y, x].any()
    x, y = joints[[3, 4]].mean(0).astype(int)
    assert not picture[y, x].any() and whole[y, x].any()


def test_nobody_is_black_and_two_are_both_drawn():
    assert not draw_people([], 32, 48, 0.3).any() and draw_people([], 32, 48, 0.3).shape == (32, 48, 3)
    joints, sure = openpose_joints(STANDING / 4, SURE)
    further = joints + np.array([120, 0])
    left, right = (draw_people([(one, sure)], 128, 256, 0.3) for one in (joints, further))
    both = draw_people([(joints, sure), (further, sure)], 128, 256, 0.3)
    assert np.array_equal(both, np.maximum(left, right))


def test_joints_outside_the_picture_are_no_error():
    joints, sure = openpose_joints(STANDING - 200, SURE)
    assert draw_people([(joints, sure)], 64, 64, 0.3).shape == (64, 64, 3)
