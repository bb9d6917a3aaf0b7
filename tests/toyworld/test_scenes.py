"""Scenes: what is allowed in one, how things move, and the files they are kept in."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tav_model.errors import TavError
from toyworld.samples import held_out, random_scene
from toyworld.scenes import (
    ATTRIBUTES,
    COLOURS,
    GROUND_LINE,
    GROUNDS,
    MOTIONS,
    OBJECTS,
    Scene,
    Truth,
    load_truth,
    save_truth,
)

TIMES = np.linspace(0, 1, 97)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    words = {name: draw(st.sampled_from(values)) for name, values in (ATTRIBUTES | {"motion": MOTIONS}).items()}
    numbers = {name: draw(st.floats(0, 1)) for name in ("start", "end", "view")}
    return Scene(**words, **numbers, radius=draw(st.floats(0.1, 0.25)))


@given(scenes())
def test_motion_is_continuous_and_in_the_picture_where_its_ends_are(scene: Scene):
    poses = [scene.pose(time) for time in TIMES]
    places = np.array([(pose.x, pose.y) for pose in poses])
    assert np.abs(np.diff(places, axis=0)).max() < 0.12
    assert np.abs(np.diff([pose.rotation for pose in poses])).max() < 0.2
    assert all(0.06 < pose.radius < 0.34 for pose in poses)
    assert places.min() > -0.07 and places.max() < 1.07


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_differ(motion: str):
    poses = {m: [Scene(motion=m).pose(time) for time in TIMES] for m in MOTIONS}
    assert all(poses[motion] != poses[other] for other in MOTIONS if other != motion)


def test_what_each_motion_does():
    def track(motion: str) -> np.ndarray:
        return np.array([dataclasses.astuple(Scene(motion=motion, radius=0.2).pose(time)) for time in TIMES])

    x, y, _, _ = track("bouncing").T
    assert (np.diff(x) > 0).all()
    touching = np.isclose(y, GROUND_LINE - 0.2, atol=1e-6)
    assert touching[[0, 48, 96]].all() and touching.sum() == 3
    x, y, _, rotation = track("rolling").T
    assert np.ptp(y) == 0 and np.allclose(np.diff(rotation) * 0.2, np.diff(x))  # it does not slip
    x, y, _, _ = track("rising").T
    assert (np.diff(y) <= 0).all() and y[0] - y[-1] > 0.3
    x, y, _, rotation = track("swinging").T
    assert np.isclose(x[0], x[-1]) and np.isclose(x[0], 0.22) and np.isclose(x.max(), 0.78, atol=1e-3)
    assert np.allclose(np.hypot(x - 0.5, y + 0.27), 0.85) and (rotation * (x - 0.5) <= 1e-12).all()
    x, y, _, _ = track("zigzagging").T
    assert sum(np.diff(np.sign(np.diff(y))) != 0) == 2 and (np.diff(x) > 0).all()
    _, y, radius, _ = track("growing").T
    assert (np.diff(radius) > 0).all() and np.allclose(y + radius, GROUND_LINE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"object": "dog"}, "scene: object 'dog' must be one of ball, cube"),
        ({"colour": "Red"}, "scene: colour 'Red' must be one of red, orange"),
        ({"motion": ""}, "scene: motion '' must be one of bouncing"),
        ({"radius": 0.5}, "scene: radius 0.5 must be a number from 0.1 to 0.25"),
        ({"view": float("nan")}, "scene: view nan must be a number from 0 to 1"),
        ({"start": "0.2"}, "scene: start '0.2' must be a number from 0 to 1"),
        ({"end": True}, "scene: end True must be a number from 0 to 1"),
        ({"pan": 2}, "scene: pan 2 must be a number from -1 to 1"),
        ({"passes": 0.5}, "scene: passes 0.5 must be a number from 1 to 1000"),
        ({"pattern": "zebra"}, "scene: pattern 'zebra' must be one of none, stripes"),
        ({"accent": "red"}, "scene: accent 'red' must be one of white, black"),
    ],
)
def test_scenes_that_are_refused(changes: dict, message: str):
    with pytest.raises(TavError, match=message.replace("(", r"\(")):
        Scene(**changes)


@pytest.mark.parametrize("motion", MOTIONS)
def test_an_object_travels_its_path_back_and_forth(motion: str):
    once, thrice = Scene(motion=motion), Scene(motion=motion, passes=3)
    for time in TIMES:
        there, back, again = (thrice.pose((start + time) / 3) for start in range(3))
        for pose, expected in ((there, once.pose(time)), (back, once.pose(1 - time)), (again, once.pose(time))):
            assert dataclasses.astuple(pose) == pytest.approx(dataclasses.astuple(expected), abs=1e-9)


def test_an_edit_keeps_the_motion_and_the_view():
    scene = Scene(motion="swinging", view=0.3)
    edited = scene.edited(object="cube", sky="night")
    assert dataclasses.asdict(edited) == dataclasses.asdict(scene) | {"object": "cube", "sky": "night"}
    for time in TIMES:
        assert edited.pose(time) == scene.pose(time)
    with pytest.raises(TavError, match="edit: 'motion' must be one of object"):
        scene.edited(motion="rolling")


@given(scenes())
def test_scene_files_give_the_scene_back(tmp_path_factory: pytest.TempPathFactory, scene: Scene):
    path = tmp_path_factory.mktemp("scene") / "scene.json"
    colour = "blue" if scene.colour != "blue" else "red"
    save_truth(path, scene, 24, {"other": {"colour": colour}})
    assert load_truth(path) == Truth(scene, 24, {"other": scene.edited(colour=colour)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a scene file"),
        ("{}", "not a scene file"),
        ('{"scene": {"speed": 3}}', "'speed' must be one of accent, colour"),
        ('{"scene": {"colour": "mauve"}}', "colour 'mauve' must be one of"),
        ('{"scene": {}, "frames": 3, "edits": {"a": {"size": "big"}}}', "edit: 'size' must be one of object"),
        ('{"scene": {}, "frames": 3, "edits": {"a": 3}}', "not a scene file"),
        ('{"scene": {}, "frames": 3}', "not a scene file"),
        ('{"scene": {}, "frames": 3, "edits": {"a": {"colour": "red"}}}', "edit 'a' changes nothing"),
        ('{"scene": {}, "frames": 0, "edits": {}}', "frames 0 must be a whole number of at least 1"),
        ("nonsense", "not a JSON file"),
    ],
)
def test_scene_files_that_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "scene.json"
    path.write_text(text)
    with pytest.raises(TavError, match=message) as caught:
        load_truth(path)
    assert str(path) in str(caught.value)


def test_times_of_frames():
    truth = Truth(Scene(), 24, {})
    assert truth.times([0, 23]) == [0.0, 1.0] and truth.times([]) == []
    assert Truth(Scene(), 1, {}).times([0]) == [0.0]


def test_held_out_triples_leave_every_pair_to_the_training():
    triples = list(itertools.product(OBJECTS, COLOURS, GROUNDS))
    kept = [t for t in triples if not held_out(Scene(object=t[0], colour=t[1], ground=t[2]))]
    assert len(triples) - len(kept) == 40
    for places in itertools.combinations(range(3), 2):
        assert {tuple(t[i] for i in places) for t in kept} == {tuple(t[i] for i in places) for t in triples}


def test_random_scenes_are_of_the_half_that_is_asked_for_and_of_every_kind():
    rng = np.random.default_rng(0)
    seen = [random_scene(rng) for _ in range(400)]
    unseen = [random_scene(rng, unseen=True) for _ in range(100)]
    assert not any(map(held_out, seen)) and all(map(held_out, unseen))
    for name, values in (ATTRIBUTES | {"motion": MOTIONS}).items():
        assert {getattr(scene, name) for scene in seen} == set(values)


def test_sample_clips_are_what_their_scene_files_say():
    from toyworld.captions import caption
    from toyworld.clips import CLIPS

    data = Path(__file__).resolve().parents[2] / "data"
    assert len(CLIPS) >= 4 and len({clip.scene.motion for clip in CLIPS.values()}) == len(CLIPS)
    for name, clip in CLIPS.items():
        assert load_truth(data / "scenes" / f"{name}.json") == clip and clip.frames == 24
        assert {clip.category(edit) for edit in clip.edits} == {"object", "background", "style", "multiple", "colour"}
        rows = (data / f"{name}.csv").read_text().splitlines()
        assert rows[0] == "prompt,name,category"
        assert rows[1:] == [f"{caption(edited)},{edit},{clip.category(edit)}" for edit, edited in clip.edits.items()]


def test_scene_files_without_a_pattern_are_plain(tmp_path: Path):
    path = tmp_path / "scene.json"
    path.write_text('{"scene": {"object": "car", "radius": 0.2}, "frames": 8, "edits": {"a": {"colour": "blue"}}}')
    scene = load_truth(path).scene
    assert (scene.pattern, scene.pan) == ("none", 0) and scene == Scene("car", radius=0.2)
