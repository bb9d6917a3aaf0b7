"""params.yaml as checked, typed parameters; and changes to it that keep its comments."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from tav_model.errors import TavError
from tav_model.files import write_text

CLIP_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

AttentionFrame = Literal["first", "former", "self", "middle", "next", "all"]
Precision = Literal["float32", "bfloat16", "float16"]
Side = Annotated[int, Field(ge=64, le=4096, multiple_of=8)]
Steps = Annotated[int, Field(ge=1, le=1000)]
GuidanceScale = Annotated[float, Field(ge=1, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Section(BaseModel):
    # Strict: a bool is no number, "3" is no 3. JSON's numbers have no NaN.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Runtime(_Section):
    """What decides speed and memory only."""

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1, mps")
    decode_chunk: int = Field(8, ge=1, le=1024, description="frames that the VAE sees at a time")
    checkpoint_every: int = Field(50, ge=1, le=100000, description="tuning steps from one checkpoint to the next")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    edit_batch: int = Field(1, ge=1, le=64, description="prompts that are sampled together")


class Attention(_Section):
    """Which frames a frame looks at."""

    spatial: list[AttentionFrame] = Field(
        ["first", "former"], min_length=1, max_length=6, description="where each frame's keys and values come from"
    )
    temporal: bool = Field(True, description="attention over time at each position")


class Decode(_Section):
    """Which frames of the clip, and how large."""

    frames: int = Field(32, ge=1, le=1024, description="how many")
    width: Side = Field(512, description="in pixels; a multiple of 8")
    height: Side = Field(512, description="in pixels; a multiple of 8")
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how another aspect is made to fit")
    sampling: Literal["uniform", "stride"] = Field(
        "uniform", description="uniform: evenly from start to end; stride: every stride-th frame from start"
    )
    start: int = Field(0, ge=0, description="the first frame")
    stride: int = Field(1, ge=1, description="for sampling: stride")
    end: int | None = Field(None, ge=1, description="the frame after the last; null: the end of the clip")


class Encode(_Section):
    """Frames to latents."""

    precision: Precision = Field("float32", description="of the VAE")


class Tune(_Section):
    """The tuning; the paper's settings by default."""

    steps: int = Field(500, ge=1, le=100000, description="updates of the weights")
    learning_rate: float = Field(3e-5, gt=0, le=1)
    learning_rate_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="as diffusers names them")
    warmup_steps: int = Field(0, ge=0, le=100000)
    accumulation_steps: int = Field(1, ge=1, le=1000, description="backward passes to an update")
    precision: Precision = Field("float32", description="of the products; trained weights stay in float32")
    max_gradient_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(1e-2, ge=0, le=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0, le=1)
    trainable: list[str] = Field(
        ["attn1.to_q", "attn2.to_q", "attn_temp"], min_length=1, description="modules, by the end of their names"
    )


class Invert(_Section):
    """The inversion."""

    steps: Steps = Field(50, description="of DDIM")
    prompt: str = Field("", description="what the inversion is told; the paper's is empty")
    precision: Precision = Field("float32", description="of the UNet; the latents stay in float32")


class Edit(_Section):
    """The sampling of the edits; a row of the CSV may set its own steps, guidance_scale, seed and negative_prompt."""

    steps: Steps = Field(50, description="of DDIM")
    guidance_scale: GuidanceScale = Field(12.5, description="classifier-free guidance; 1 is none")
    negative_prompt: str = Field("", description="what to steer away from")
    start: Literal["inverted", "random"] = Field("inverted", description="from the inverted latents, or from noise")
    precision: Precision = Field("float32", description="of the UNet; the latents and the VAE stay in float32")


class Score(_Section):
    """The models that score."""

    clip_model: str | None = Field(None, description="a CLIP model; null: only the metrics that need none")
    pickscore_model: str | None = Field(None, description="yuvalkirstain/PickScore_v1; null: none")


class Tracking(_Section):
    """Where the runs are logged."""

    uri: str | None = Field("sqlite:///mlflow.db", description="MLflow's tracking URI; null: nowhere")
    experiment: str = Field("tav", min_length=1, max_length=200, description="MLflow's experiment")


DecodeOverrides = create_model(
    "DecodeOverrides",
    __base__=_Section,
    **{name: (field.rebuild_annotation() | None, None) for name, field in Decode.model_fields.items()},
)


class Clip(_Section):
    """One clip, its caption and its edits."""

    video: str = Field(min_length=1, description="a video, or a folder of numbered images, in the project")
    caption: str = Field(min_length=1, description="what is seen in it")
    prompts: str = Field(min_length=1, description="a CSV of edits, in the project")
    decode: DecodeOverrides = Field(description="what this clip wants otherwise than the section decode; may be {}")


def _safe_names(clips: dict[str, Clip]) -> dict[str, Clip]:
    for name in clips:
        if not CLIP_NAME.fullmatch(name):
            raise ValueError(f"the clip name {name!r} must be 1 to 64 of a-z, 0-9, _ and -, not starting with _ or -")
    return clips


class Params(_Section):
    """All of params.yaml. DVC watches keys and sections of the file, so they must be there even where empty."""

    base_model: str = Field(min_length=1, description="a folder in the project, a name in $TAV_MODELS, or a hub id")
    seed: Seed = Field(description="of every random number")
    attention: Attention
    decode: Decode
    encode: Encode
    tune: Tune
    invert: Invert
    edit: Edit
    score: Score
    runtime: Runtime = Runtime()
    tracking: Tracking = Tracking()
    clips: Annotated[dict[str, Clip], Field(min_length=1), AfterValidator(_safe_names)]

    def clip(self, name: str) -> Clip:
        """One clip's entry. Raises TavError where there is none of this name."""
        if name not in self.clips:
            raise TavError(f"params.yaml: clips: no clip named {name!r}; there are: {', '.join(self.clips)}")
        return self.clips[name]

    def decode_for(self, clip: str) -> Decode:
        """The section `decode` with what the clip wants otherwise."""
        wanted = self.clip(clip).decode.model_dump(exclude_unset=True)
        return self.decode.model_copy(update=wanted)


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        TavError: with the file, the key, the value and what is allowed, for the first mistake and how many there are.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TavError(f"{path}: no such file; run this in the project's folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TavError(f"{path}: cannot be read ({error})") from None
    return _check(path.name, _parse(path.name, text))


def write_overrides(path: Path, overrides: Mapping[str, Any]) -> Params:
    """Change values in params.yaml by dotted key, keeping comments and order; returns the new parameters.

    A clip's `decode` may get a key that it does not have yet; every other key must be there already. A file whose values
    are these already is left as it is.

    Raises:
        TavError: an unknown key or a value that is not allowed; the file is as it was.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedSeq

    params = load_params(path)
    round_trip = YAML()
    round_trip.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    round_trip.preserve_quotes = True
    round_trip.width = 10000
    content = round_trip.load(path.read_text(encoding="utf-8"))
    changed = False
    for dotted, value in overrides.items():
        *sections, key = dotted.split(".")
        place = content
        for section in sections:
            place = place.get(section) if isinstance(place, Mapping) else None
        known = place.keys() if isinstance(place, Mapping) else ()
        if sections[:1] == ["clips"] and sections[2:] == ["decode"]:
            known = Decode.model_fields.keys()
        elif sections and sections[0] in Params.model_fields and len(sections) == 1:
            known = dict.fromkeys([*known, *getattr(Params.model_fields[sections[0]].annotation, "model_fields", ())])
        if key not in known:
            raise TavError(f"override {dotted}: no such key in {path.name}{_suggest(key, known)}")
        if place.get(key) != value or key not in place:
            if isinstance(value, list):
                value = CommentedSeq(value)
                value.fa.set_flow_style()
            place[key] = value
            changed = True
    if not changed:
        return params
    stream = io.StringIO()
    round_trip.dump(content, stream)
    params = _check(path.name, _parse(path.name, stream.getvalue()))
    write_text(path, stream.getvalue())
    return params


class _Loader(yaml.SafeLoader):
    """Safe YAML, less the surprises: a key given twice is an error, and 3e-5 is a number, as DVC reads it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise TavError(f"{name}:{where} {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TavError(f"{name}: not YAML ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(content, dict):
        raise TavError(f"{name}: must be a mapping of sections")
    return content


def _check(name: str, content: dict[str, Any]) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise TavError(f"{name}: {_describe(problems[0])}{more}") from None


def _describe(problem: ErrorDetails) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(problem["loc"][:-1])
        return f"{key}: unknown key{_suggest(str(problem['loc'][-1]), allowed)}"
    if problem["type"] == "missing":
        return f"{key}: is missing"
    reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key}: {problem['input']!r} is not allowed: {reason}"


def _allowed_keys(sections: tuple[int | str, ...]) -> list[str]:
    if not sections:
        return list(Params.model_fields)
    if sections[0] == "clips":
        return list(Decode.model_fields if len(sections) > 2 else Clip.model_fields)
    return list(getattr(Params.model_fields[str(sections[0])].annotation, "model_fields", ()))


def _suggest(key: str, allowed: Any) -> str:
    close = difflib.get_close_matches(key, list(allowed), 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"{meant} (allowed: {', '.join(allowed)})" if allowed else meant
