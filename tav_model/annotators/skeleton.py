"""Draw people as the coloured skeletons of OpenPose, which published pose ControlNets were trained on.

Joints are the 18 of OpenPose (Cao et al., arXiv 1812.08008): those of COCO, and a neck between the shoulders.
"""

from __future__ import annotations

import math

import numpy as np

# For each joint of OpenPose, its place among COCO's 17; the neck, which COCO does not have, is joint 1.
NECK, SHOULDERS = 1, (5, 6)
FROM_COCO = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),  # Arms.
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),  # Legs.
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),  # Head.
)
# Fully saturated colours around the circle, the last of which no limb has.
COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
# Half the width of a limb and the radius of a joint, in pixels of a picture whose shorter side has 512.
STICK = 4
LIMB_BRIGHTNESS = 0.6


def openpose_joints(keypoints: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return OpenPose's 18 joints of a person, (18, 2) and their scores (18,), from COCO's 17.

    Args:
        keypoints: x and y in pixels, (17, 2).
        scores: how sure each of them is, (17,).
    """
    left, right = SHOULDERS
    joints, sure = keypoints[list(FROM_COCO)].astype(np.float64), scores[list(FROM_COCO)].astype(np.float64)
    joints[NECK] = (keypoints[left] + keypoints[right]) / 2
    sure[NECK] = min(scores[left], scores[right])
    return joints, sure


def draw_people(people: list[tuple[np.ndarray, np.ndarray]], height: int, width: int, least: float) -> np.ndarray:
    """Return a black picture with people's skeletons, `height width 3` in uint8.

    Args:
        people: the joints (18, 2) and the scores (18,) of each person.
        height: of the picture in pixels.
        width: of the picture in pixels.
        least: score below which a joint is left out.
    """
    import cv2

    canvas = np.zeros((height, width, 3), np.uint8)
    stick = max(1, round(STICK * min(height, width) / 512))
    for joints, scores in people:
        for (start, end), colour in zip(LIMBS, COLOURS, strict=False):
            if min(scores[start], scores[end]) < least:
                continue
            middle = joints[[start, end]].mean(0)
            dx, dy = joints[end] - joints[start]
            axes = (int(math.hypot(dx, dy) / 2), stick)
            centre = (int(middle[0]), int(middle[1]))
            outline = cv2.ellipse2Poly(centre, axes, int(math.degrees(math.atan2(dy, dx))), 0, 360, 1)
            cv2.fillConvexPoly(canvas, np.array(outline), colour)
    canvas = (canvas * LIMB_BRIGHTNESS).astype(np.uint8)
    for joints, scores in people:
        for (x, y), score, colour in zip(joints, scores, COLOURS, strict=True):
            if score >= least:
                cv2.circle(canvas, (int(x), int(y)), stick, colour, thickness=-1)
    return canvas
