"""The benchmark: both of its forms, and everything that is refused."""

from pathlib import Path

import pytest
import yaml

from tav.media.loveu_tgve import Entry, choose, read_benchmark
from tav_model.errors import TavError
from tests.support.loveu_tgve import HEADER, write_table

FISH = ("gold-fish", "Fish swim.", "Fish swim, oil painting.", "Sharks swim.", "Fish fly.", "Sharks fly, oil painting.")
LOTUS = ("lotus", "A lotus.", "A lotus, sketch.", "A poppy.", "A lotus in a city.", "A poppy in a city, sketch.")
SWAN = ("swan", "A swan.", "A swan, cubist.", "A duck.", "A swan in space.", "A duck in space, cubist.")


def add_frames(folder: Path, of_set: str, clip: str) -> Path:
    frames = folder / of_set / "480p_frames" / clip
    frames.mkdir(parents=True)
    (frames / "00000.jpg").touch()
    return frames


def write_config(path: Path, clip: tuple[str, ...], video_path: str, **changes: object) -> None:
    """A clip's config with the keys that the original's have."""
    prompts = dict(zip(("style", "object", "background", "multiple"), clip[2:], strict=True))
    content = {
        "pretrained_model_path": "./checkpoints/stable-diffusion-v1-4",
        "train_data": {"video_path": video_path, "prompt": clip[1], "num_frames": 32},
        "validation_data": {"prompts": prompts, "guidance_scale": 12.5},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        content[section][name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clips of two sets, with frames."""
    folder = tmp_path / "loveu tgvé"
    for of_set, clip in (("DAVIS_480p", FISH), ("videvo_480p", LOTUS), ("videvo_480p", SWAN)):
        add_frames(folder, of_set, clip[0])
    return folder


@pytest.fixture
def table(folder: Path) -> Path:
    return write_table(folder, {"DAVIS_480p": [FISH], "youtube_480p": [], "videvo_480p": [LOTUS, SWAN]})


def test_table(folder: Path, table: Path):
    entries = read_benchmark(folder)
    assert entries[0] == Entry(
        set="DAVIS_480p",
        clip="gold-fish",
        caption="Fish swim.",
        prompts={
            "style": "Fish swim, oil painting.",
            "object": "Sharks swim.",
            "background": "Fish fly.",
            "multiple": "Sharks fly, oil painting.",
        },
        frames=folder / "DAVIS_480p" / "480p_frames" / "gold-fish",
        source="LOVEU-TGVE-2023_Dataset.csv: line 3",
    )
    assert [entry.name for entry in entries] == ["DAVIS_480p/gold-fish", "videvo_480p/lotus", "videvo_480p/swan"]
    assert [entry.clip_name for entry in entries] == ["davis_480p-gold-fish", "videvo_480p-lotus", "videvo_480p-swan"]
    assert [entry.source.rpartition(" ")[2] for entry in entries] == ["3", "8", "9"]


def test_table_as_other_programs_save_it(folder: Path, table: Path):
    wanted = read_benchmark(folder)
    text = table.read_text().replace("Fish swim.,", '"Fish\nswim. ",').replace("DAVIS Videos:", "davis videos")
    table.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [(e.name, e.caption, e.prompts) for e in read_benchmark(folder)] == [
        (e.name, e.caption, e.prompts) for e in wanted
    ]


def test_video_where_there_are_no_frames(folder: Path, table: Path):
    (folder / "DAVIS_480p" / "480p_frames" / "gold-fish" / "00000.jpg").unlink()
    with pytest.raises(TavError, match=r"line 3: DAVIS_480p/gold-fish has no frames; .*480p_videos/gold-fish\.mp4"):
        choose(read_benchmark(folder))
    assert [e.clip for e in choose(read_benchmark(folder), ["videvo_480p/swan"])] == ["swan"]
    video = folder / "DAVIS_480p" / "480p_videos" / "gold-fish.mp4"
    video.parent.mkdir()
    video.touch()
    assert choose(read_benchmark(folder))[0].frames == video


def test_choice_of_clips(folder: Path, table: Path):
    entries = read_benchmark(folder)
    assert choose(entries) == entries
    assert choose(entries, ["videvo_480p/swan", "DAVIS_480p/gold-fish"]) == [entries[0], entries[2]]
    with pytest.raises(TavError, match=r"--only: no clip 'swan'; must be SET/CLIP, one of: DAVIS_480p/gold-fish"):
        choose(entries, ["swan"])


@pytest.mark.parametrize("inside", [True, False])
def test_configs_are_the_same_clips(folder: Path, table: Path, inside: bool):
    """Of a clone with the data inside it, or of the data's own folder."""
    wanted = [(e.name, e.caption, e.prompts) for e in read_benchmark(folder)]
    table.unlink()
    top = folder
    if inside:
        top = folder.parent / "clone"
        (top / "data").mkdir(parents=True)
        folder.rename(top / "data" / "loveu-tgve-2023")
    for of_set, clip in (("videvo_480p", SWAN), ("videvo_480p", LOTUS), ("DAVIS_480p", FISH)):
        path = f"./data/loveu-tgve-2023/{of_set}/480p_frames/{clip[0]}"
        write_config(top / "configs" / "loveu-tgve-2023" / of_set / f"{clip[0]}.yaml", clip, path)
    write_config(top / "configs" / "template.yaml", FISH, "data/xxx.mp4")
    entries = choose(read_benchmark(top))
    assert [(e.name, e.caption, e.prompts) for e in entries] == wanted
    data = top / "data" / "loveu-tgve-2023" if inside else top
    assert entries[0].frames == data / "DAVIS_480p" / "480p_frames" / "gold-fish"
    assert entries[0].source == "configs/loveu-tgve-2023/DAVIS_480p/gold-fish.yaml"


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("Style Change Caption,", "", "line 1: the column 'Style Change Caption' is missing; there are: Video name"),
        ("Source", "Video name", "line 1: the column 'Video name' appears twice"),
        (
            "DAVIS Videos:",
            "TikTok Videos:",
            "line 2: 'TikTok Videos:' is not a set .*allowed: 'DAVIS Videos:', 'youtube",
        ),
        ("DAVIS Videos:", "", "line 3: a clip before the first heading"),
        ("gold-fish", "../gold-fish", r"line 3: Video name: '\.\./gold-fish' is not allowed: must be 1 to 48 of a-z"),
        ("gold-fish", "/etc/passwd", "line 3: Video name: '/etc/passwd' is not allowed"),
        ("gold-fish", "", "line 3: Video name: '' is not allowed"),
        ("gold-fish", "f" * 49, "line 3: Video name: 'ffff.*' is not allowed: must be 1 to 48"),
        ("Sharks swim.", " ", "line 3: Object Change Caption: must be a non-empty string"),
        ("Fish swim.", "", "line 3: Our GT caption: must be a non-empty string"),
        ("Sharks swim.", "Sharks \x07swim.", "line 3: Object Change Caption: .*without control characters"),
        (",".join(FISH[1:]), ",,,,", "line 3: 'gold-fish' has no caption and no prompts; a clip needs all five"),
        (
            "swan,A swan.",
            "lotus,A swan.",
            r"line 9: videvo_480p/lotus is already defined in LOVEU-TGVE-2023_Dataset\.csv: l",
        ),
        ("Sharks swim.", '"Sharks', r"line 3: not CSV \("),
    ],
)
def test_refused_tables(folder: Path, table: Path, old: str, new: str, error: str):
    text = table.read_text().replace('"', "")
    assert ",".join(HEADER) in text
    rows = text.replace(", oil", " oil").replace(", sketch", " sketch").replace(", cubist", " cubist")
    changed = rows.replace(old.replace(", oil", " oil"), new, 1)
    assert changed != rows
    table.write_text(changed)
    with pytest.raises(TavError, match=error) as raised:
        choose(read_benchmark(folder))
    assert "\n" not in str(raised.value) and table.name in str(raised.value)


def test_refused_encodings(folder: Path, table: Path):
    table.write_bytes(table.read_bytes().replace(b"A swan.", "Ein Schwän.".encode("latin-1")))
    with pytest.raises(TavError, match="line 9: not UTF-8"):
        read_benchmark(folder)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"train_data__video_path": "/data/gold-fish"}, "train_data.video_path: '/data/gold-fish' is not allowed"),
        ({"train_data__video_path": "../../gold-fish"}, r"train_data.video_path: '\.\./\.\./gold-fish' is not allowed"),
        ({"train_data__video_path": 3}, "train_data.video_path: must be a non-empty string"),
        ({"train_data__prompt": None}, "train_data.prompt: must be a non-empty string"),
        ({"validation_data__prompts": ["a", "b"]}, "validation_data.prompts: must be a mapping with the keys style"),
        ({"validation_data__prompts": {"style": "a"}}, "validation_data.prompts: must be .*multiple; is: style"),
        (
            {"validation_data__prompts": {"style": 1, "object": "b", "background": "c", "multiple": "d"}},
            "prompts.style",
        ),
    ],
)
def test_refused_configs(folder: Path, changes: dict, error: str):
    write_config(folder / "DAVIS_480p" / "gold-fish.yaml", FISH, "DAVIS_480p/480p_frames/gold-fish", **changes)
    with pytest.raises(TavError, match=rf"^DAVIS_480p/gold-fish\.yaml: .*{error}"):
        choose(read_benchmark(folder))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("train_data: {prompt: [", "line 1: not YAML"),
        ("a: !!python/object/apply:os.system ['touch ran']", "line 1: not YAML"),
        ("train_data: {}", "validation_data is missing"),
        ("validation_data: {}", "validation_data.prompts is missing"),
        ("[" * 5000, "not YAML"),
        ("#" * 2**20 + "\n#", "larger than 1 MiB"),
    ],
)
def test_refused_yaml(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: str):
    monkeypatch.chdir(folder)
    path = folder / "DAVIS_480p" / "gold-fish.yaml"
    path.write_text(text)
    with pytest.raises(TavError, match=rf"^DAVIS_480p/gold-fish\.yaml: .*{error}"):
        read_benchmark(folder)
    assert not (folder / "ran").exists()


def test_links_may_not_lead_out(folder: Path, table: Path, tmp_path: Path):
    frames = folder / "DAVIS_480p" / "480p_frames" / "gold-fish"
    frames.rename(tmp_path / "outside")
    frames.symlink_to(tmp_path / "outside")
    with pytest.raises(TavError, match=r"line 3: .*gold-fish leads out of .*outside; must be inside"):
        read_benchmark(folder)


def test_folders_without_a_benchmark(tmp_path: Path):
    with pytest.raises(TavError, match="no such folder"):
        read_benchmark(tmp_path / "nowhere")
    with pytest.raises(TavError, match=r"no clips: must contain LOVEU-TGVE-2023_Dataset\.csv, or SET/CLIP\.yaml"):
        read_benchmark(tmp_path)
    (tmp_path / "LOVEU-TGVE-2023_Dataset.csv").touch()
    with pytest.raises(TavError, match="is empty; needs the columns Video name, Our GT caption"):
        read_benchmark(tmp_path)
