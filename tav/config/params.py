"""params.yaml as checked, typed parameters; and changes to it that keep its comments."""

from __future__ import annotations

import difflib
import io
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from tav.config.paths import project_path
from tav_model.errors import TavError
from tav_model.files import read_text, write_text

# The sections of params.yaml that decide a result.
RESULT_SECTIONS = ("base_model", "seed", "attention", "encode", "tune", "invert", "edit", "score")
# The reader of YAML takes a second for 50 KB.
LARGEST = 2**20
# A text that is itself in YAML wherever it stands, without quotes.
PLAIN = re.compile(r"[^\W\d_][\w ./-]*(?<! )")


def _in_project(text: str | None) -> str | None:
    if text is not None:
        try:
            project_path(Path(), text, "")
        except TavError as error:
            raise ValueError(str(error).rpartition(": ")[2]) from None
    return text


def _plain_text(text: str) -> str:
    """As the prompts of a CSV: terminals, logs and pages would act on control characters."""
    if any(unicodedata.category(letter) == "Cc" and letter not in "\t\n" for letter in text):
        raise ValueError("must be a text without control characters")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a text that is not blank")
    return _plain_text(text)


AttentionFrame = Literal["first", "former", "self", "middle", "next", "all"]
Precision = Literal["float32", "bfloat16", "float16"]
Side = Annotated[int, Field(ge=64, le=4096, multiple_of=8)]
Steps = Annotated[int, Field(ge=1, le=1000)]
GuidanceScale = Annotated[float, Field(ge=1, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
InProject = AfterValidator(_in_project)
PlainText = Annotated[str, AfterValidator(_plain_text)]
# As part of a file's and of a DVC stage's name.
CLIP_NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
ClipName = Annotated[str, Field(pattern=f"^{CLIP_NAME}$")]
CLIP_NAME_RULE = "must be 1 to 64 of a-z, 0-9, _ and -, beginning with a letter or digit"


class _Section(BaseModel):
    # Strict: a bool is no number, "3" is no 3.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RuntimeParams(_Section):
    """What decides speed and memory only."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:NUMBER"
    )
    decode_chunk: int = Field(8, ge=1, le=1024, description="frames that the VAE sees at a time")
    checkpoint_every: int = Field(50, ge=1, le=100000, description="tuning steps from one checkpoint to the next")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    edit_batch: int = Field(1, ge=1, le=64, description="prompts that are sampled together")
    ray: str | None = Field(
        None,
        pattern=r"^(local|(ray://)?[\w.-]+:\d{1,5})$",
        description="local, HOST:PORT or ray://HOST:PORT of a Ray cluster for the flow's rows, or null",
    )
    ray_gpus: float = Field(1.0, gt=0, le=64, description="share of a GPU that a row asks of Ray")


class AttentionParams(_Section):
    """Which frames a frame looks at."""

    spatial: list[AttentionFrame] = Field(
        ["first", "former"], min_length=1, max_length=6, description="where each frame's keys and values come from"
    )
    temporal: bool = Field(True, description="attention over time at each position")


class DecodeParams(_Section):
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


class EncodeParams(_Section):
    """Frames to latents."""

    precision: Precision = Field("float32", description="of the VAE")


class TuneParams(_Section):
    """The tuning; the paper's settings by default."""

    steps: int = Field(500, ge=0, le=100000, description="updates of the weights; 0: the base model as it is")
    learning_rate: float = Field(3e-5, gt=0, le=1, description="of AdamW, where the schedule has it at its height")
    learning_rate_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="as diffusers names them")
    warmup_steps: int = Field(0, ge=0, le=100000, description="updates until the learning rate is at its height")
    accumulation_steps: int = Field(1, ge=1, le=1000, description="backward passes to an update")
    precision: Precision = Field("float32", description="of the products; trained weights stay in float32")
    max_gradient_norm: float = Field(1.0, gt=0, description="gradients of a larger norm are scaled down to it")
    weight_decay: float = Field(1e-2, ge=0, le=1, description="of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's mean of the gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's mean of the squared gradients")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="what AdamW adds to the divisor")
    trainable: list[str] = Field(
        ["attn1.to_q", "attn2.to_q", "attn_temp"], min_length=1, description="modules, by the end of their names"
    )


class InvertParams(_Section):
    """The inversion."""

    steps: Steps = Field(50, description="of DDIM")
    prompt: PlainText = Field("", description="what the inversion is told; the paper's is empty")
    precision: Precision = Field("float32", description="of the UNet; the latents stay in float32")


class EditParams(_Section):
    """The sampling of the edits; a row of the CSV may set its own steps, guidance_scale, seed and negative_prompt."""

    steps: Steps = Field(50, description="of DDIM")
    guidance_scale: GuidanceScale = Field(12.5, description="classifier-free guidance; 1 is none")
    negative_prompt: PlainText = Field("", description="what to steer away from")
    start: Literal["inverted", "random"] = Field("inverted", description="from the inverted latents, or from noise")
    precision: Precision = Field("float32", description="of the UNet; the latents and the VAE stay in float32")


class ScoreParams(_Section):
    """The models that score."""

    clip_model: Annotated[str | None, InProject] = Field(
        None, description="a CLIP model; null: only the metrics that need none"
    )
    pickscore_model: Annotated[str | None, InProject] = Field(
        None, description="yuvalkirstain/PickScore_v1; null: none"
    )


class TrackingParams(_Section):
    """Where the runs are logged."""

    uri: str | None = Field("sqlite:///mlflow.db", description="MLflow's tracking URI; null: nowhere")
    experiment: str = Field("tav", min_length=1, max_length=200, description="MLflow's experiment")
    log_model: bool = Field(True, description="log each tuning as a model that mlflow.pyfunc loads")


# Only what is given counts: None here is no value that a file may have, except for `end`.
if TYPE_CHECKING:

    class DecodeOverrides(_Section):
        pass

else:
    DecodeOverrides = create_model(
        "DecodeOverrides",
        __base__=_Section,
        **{
            name: (field.rebuild_annotation(), Field(None, description=field.description))
            for name, field in DecodeParams.model_fields.items()
        },
    )


class ClipParams(_Section):
    """One clip, its caption and its edits."""

    video: Annotated[str, InProject] = Field(description="a video, or a folder of numbered images, in the project")
    caption: Annotated[str, AfterValidator(_not_blank)] = Field(description="what is seen in it")
    prompts: Annotated[str, InProject] = Field(description="a CSV of edits, in the project")
    decode: DecodeOverrides = Field(description="what this clip wants otherwise than the section decode; may be {}")


class Params(_Section):
    """All of params.yaml. DVC watches keys and sections of the file, so they must be there even where empty."""

    base_model: Annotated[str, InProject] = Field(
        description="a folder in the project, a name in $TAV_MODELS, or a hub id"
    )
    seed: Seed = Field(description="of every random number")
    attention: AttentionParams = Field(description="which frames a frame looks at")
    decode: DecodeParams = Field(description="which frames of the clip, and how large")
    encode: EncodeParams = Field(description="frames to latents")
    tune: TuneParams = Field(description="the tuning")
    invert: InvertParams = Field(description="the inversion")
    edit: EditParams = Field(description="the sampling of the edits")
    score: ScoreParams = Field(description="the models that score")
    runtime: RuntimeParams = Field(RuntimeParams(), description="what decides speed and memory only")
    tracking: TrackingParams = Field(TrackingParams(), description="where the runs are logged")
    clips: dict[ClipName, ClipParams] = Field(min_length=1, description="the clips, by name")

    def clip(self, name: str) -> ClipParams:
        """One clip's entry. Raises TavError where there is none of this name."""
        if name not in self.clips:
            raise TavError(f"params.yaml: clips: no clip named {name!r}; there are: {', '.join(self.clips)}")
        return self.clips[name]

    def decode_for(self, clip: str) -> DecodeParams:
        """The section `decode` with what the clip wants otherwise."""
        wanted = self.clip(clip).decode.model_dump(exclude_unset=True)
        return self.decode.model_copy(update=wanted)


def load_params(path: Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Read and check params.yaml.

    Args:
        overrides: values to take instead of the file's, by dotted key, such as `{"tune.steps": 300}`. A text stands for
            the YAML value that it spells, as on a command line, where the key does not want a text itself.

    Raises:
        TavError: with the file, the key, the value and what is allowed, for the first mistake and how many there are.
    """
    content = _parse(path.name, _read(path))
    for dotted, value in (overrides or {}).items():
        _override(path.name, content, dotted, value)
    return _check(path.name, content)


def parse_params(name: str, text: str) -> Params:
    """The parameters in the text of a params.yaml that messages call `name`.

    Raises:
        TavError: as `load_params`.
    """
    return _check(name, _parse(name, text))


def write_overrides(path: Path, overrides: Mapping[str, Any]) -> Params:
    """Change values in params.yaml by dotted key, keeping comments and order; returns the new parameters.

    A file whose values are these already is left as it is.

    Args:
        overrides: as for `load_params`.

    Raises:
        TavError: an unknown key or a value that is not allowed; the file is as it was.
    """
    params = load_params(path, overrides)
    text = _read(path)
    content = _round_trip().load(text.replace("\r\n", "\n"))
    changes = [_override(path.name, content, dotted, value) for dotted, value in overrides.items()]
    if not any(changes):
        return params
    changed = _dump(content)
    params = _check(path.name, _parse(path.name, changed))
    # Through a link, and with the line ends that the file has.
    write_text(path.resolve(), changed.replace("\n", "\r\n") if "\r\n" in text else changed)
    return params


def parse_overrides(changes: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` of a command line as `load_params` wants it.

    Raises:
        TavError: no `=`, or no key before it.
    """
    overrides = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise TavError(f"--set: {change!r} is not allowed: must be KEY=VALUE, such as tune.steps=300")
        overrides[key.strip()] = value.strip()
    return overrides


def add_clip(path: Path, name: str, clip: Mapping[str, Any]) -> tuple[str, Params]:
    """The text of params.yaml with one clip more, the last of `clips`, and the parameters in it; nothing is written.

    Every line of the file stays as it is, unless `clips` is written in braces.

    Raises:
        TavError: a clip of this name is there already, or what is given is not allowed.
    """
    text = _read(path)
    params = _check(path.name, _parse(path.name, text))
    if name in params.clips:
        raise TavError(
            f"{path.name}: clips: {name!r} is there already; give another name (--name), or change the entry there"
        )
    plain = text.replace("\r\n", "\n")
    content = _parse(path.name, plain)
    wanted = {**content, "clips": {**content["clips"], name: dict(clip)}}
    params = _check(path.name, wanted)
    new = _insert_clip(plain, name, clip)
    if new is None or _parse(path.name, new) != wanted:
        commented = _round_trip().load(plain)
        commented["clips"][name] = {key: _written(value) for key, value in clip.items()}
        new = _dump(commented)
    return new.replace("\n", "\r\n") if "\r\n" in text else new, params


def _insert_clip(text: str, name: str, clip: Mapping[str, Any]) -> str | None:
    """The text with the clip's lines below the last one of the block `clips`; None where it is no block."""
    clips = next(value for key, value in YAML(pure=True).compose(text).value if key.value == "clips")
    if clips.flow_style or not clips.value:
        return None
    column = clips.value[0][0].start_mark.column
    lines = text.split("\n")
    end = clips.end_mark.line + (clips.end_mark.column > 0)
    # The block ends where the next key begins; the empty lines and comments above that belong to it.
    while end > len(lines) or not lines[end - 1].strip() or lines[end - 1].startswith("#"):
        end -= 1
    entry = _dump({name: {key: _written(value) for key, value in clip.items()}}).removesuffix("\n")
    new = [" " * column + line for line in entry.split("\n")]
    return "\n".join([*lines[:end], *new, *(lines[end:] or [""])])


def _written(value: Any) -> Any:
    """A value in the style that it is written in: in one line, and in quotes where it is no plain words.

    ruamel would leave out quotes that its own reader then misses, such as those of ':0' in braces.
    """
    if isinstance(value, Mapping):
        braces = CommentedMap(value)
        braces.fa.set_flow_style()
        return braces
    if isinstance(value, list):
        brackets = CommentedSeq(value)
        brackets.fa.set_flow_style()
        return brackets
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return DoubleQuotedScalarString(value)
    return value


class _Representer(RoundTripRepresenter):
    """Writes `null` as such. A class of our own: DVC, in the same process, writes dvc.lock by ruamel's."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _round_trip() -> YAML:
    """A reader and writer that keeps comments, order and quotes."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 10000
    return yaml


def _dump(content: Any) -> str:
    stream = io.StringIO()
    _round_trip().dump(content, stream)
    return stream.getvalue()


def _read(path: Path) -> str:
    try:
        return read_text(path, LARGEST)
    except FileNotFoundError:
        raise TavError(f"{path}: no such file; run this in the project's folder") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TavError(f"{path}: line {line}: not UTF-8") from None
    except OSError as error:
        raise TavError(f"{path}: cannot be read ({error.strerror})") from None


def _load_yaml(text: str) -> Any:
    """YAML 1.2 by the reader that DVC has: 3e-5 is a number, `no` a text, and a key given twice an error."""
    return YAML(typ="safe", pure=True).load(text)


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        content = _load_yaml(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise TavError(f"{name}:{where} {_first_line(error.problem)}") from None
    except RecursionError:
        raise TavError(f"{name}: nested too deeply") from None
    # Dates, numbers and tags that are none make the reader fail in many ways of its own.
    except Exception as error:
        raise TavError(f"{name}: not YAML ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise TavError(f"{name}: must be a mapping of sections, such as 'tune: {{steps: 500}}'")
    return content


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def _override(name: str, content: MutableMapping, dotted: str, value: Any) -> bool:
    """Set one value in what a file holds; whether it was another one before."""
    place, kind = content, Params
    *sections, key = dotted.split(".")
    for section in sections:
        kind = _kind(name, dotted, section, kind, place)
        if not isinstance(place.get(section), MutableMapping):
            place[section] = type(place)()
        place = place[section]
    kind = _kind(name, dotted, key, kind, place)
    if isinstance(value, str):
        value = _from_text(value, kind)
    # True is 1 to Python, and a mistake here.
    if key in place and place[key] == value and isinstance(place[key], bool) == isinstance(value, bool):
        return False
    place[key] = _written(value)
    return True


def _kind(name: str, dotted: str, key: str, above: Any, place: Mapping) -> Any:
    """What stands under a key of a section, or of `clips`: a section or the type of a value."""
    if get_origin(above) is dict:
        if key not in place:
            there = ", ".join(_plain(str(clip)) for clip in place)
            raise TavError(f"{name}: override {_plain(dotted)}: no clip named {key!r}; there are: {there}")
    elif not _is_section(above) or key not in above.model_fields:
        allowed = above.model_fields if _is_section(above) else ()
        raise TavError(f"{name}: override {_plain(dotted)}: unknown key{_suggest(key, allowed)}")
    return _inner(above, key)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inner(above: Any, key: str) -> Any:
    return above.model_fields[key].annotation if _is_section(above) else ClipParams


def _from_text(text: str, kind: Any) -> Any:
    """What a text on a command line means for a key of this type."""
    kinds = (kind,) if get_origin(kind) in (None, list, dict, Literal) else get_args(kind)
    if text == "null" and type(None) in kinds:
        return None
    if any(one is str or get_origin(one) is Literal for one in kinds):
        return text
    try:
        return _load_yaml(text)
    except Exception:
        return text  # What is wrong with it then stands in the error of the key.


def _check(name: str, content: dict[str, Any]) -> Params:
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        # A key that is unknown explains one that is missing.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise TavError(f"{name}: {_describe(problems[0])}{more}") from None


def _describe(problem: ErrorDetails) -> str:
    """One problem in one line: the key, the value and what is allowed."""
    *above, last = (str(part) for part in problem["loc"])
    key = _plain(".".join(above if last == "[key]" else [*above, last]))
    if last == "[key]":
        return f"{key}: the clip's name {CLIP_NAME_RULE}"
    kind, allowed = Params, ""
    for part in [*above, last]:
        if _is_section(kind):
            if part not in kind.model_fields:
                return f"{key}: unknown key{_suggest(part, kind.model_fields)}"
            allowed = _allowed(kind.model_json_schema()["properties"][part])
        elif get_origin(kind) is not dict:
            break  # an item of a list: what is allowed stands at the list
        kind = _inner(kind, part)
        if _is_section(kind):
            allowed = f"a mapping with the keys {', '.join(kind.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: is missing; must be {allowed}"
    own_words = problem["type"] == "value_error"
    reason = problem["msg"].removeprefix("Value error, ") if own_words else f"must be {allowed}"
    return f"{key}: {_shown(problem['input'])} is not allowed: {reason}"


def _allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema of a value allows, in words."""
    match schema:
        case {"anyOf": options}:
            return " or ".join(_allowed(option) for option in options)
        case {"enum": values}:
            return f"one of {', '.join(values)}"
        case {"type": "integer" | "number" as kind}:
            noun = "a whole number" if kind == "integer" else "a number"
            words = {
                "minimum": "at least",
                "exclusiveMinimum": "more than",
                "maximum": "at most",
                "exclusiveMaximum": "less than",
            }
            bounds = [f"{words[name]} {schema[name]}" for name in words if name in schema]
            if "minimum" in schema and "maximum" in schema:
                bounds = [f"between {schema['minimum']} and {schema['maximum']}"]
            multiple = f", a multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""
            return " ".join([noun, " and ".join(bounds)]).strip() + multiple
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "null"}:
            return "null"
        case {"type": "array", "items": items, "minItems": low}:
            high = f" to {schema['maxItems']}" if "maxItems" in schema else " or more"
            return f"a list of {low}{high}, each {_allowed(items)}"
        case {"type": "object"}:
            return "a mapping with one clip or more, by name"
        case {"pattern": _, "description": description}:
            return description
        case _:
            return "a text" + (" that is not empty" if schema.get("minLength") else "")


def _shown(value: Any) -> str:
    """A value on one short line, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return short.repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"a value of the type {type(value).__name__}"


def _plain(key: str) -> str:
    """A key on one line."""
    return key if key and key.isprintable() else repr(key)


def _suggest(key: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(allowed), 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"{meant} (allowed: {', '.join(allowed)})" if allowed else meant
