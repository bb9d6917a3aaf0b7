"""The schema of params.yaml: one class for each section, one field for each key.

To add a parameter: add a field here, with its range and a description; add its line to params.yaml; and make sure that
dvc.yaml lists its section, and that of the clip, among the `params` of every stage that reads it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, TypeGuard, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from tav.config.characters import has_control_characters
from tav.config.clip_settings import RESULT_SECTIONS, with_own_settings
from tav.config.paths import project_path
from tav_model.errors import TavError

if TYPE_CHECKING:
    from tav_model.windows import WindowOptions

# A clip's name becomes part of file names and of DVC's stage names.
CLIP_NAME = r"[a-z0-9][a-z0-9_-]{0,63}"
CLIP_NAME_RULE = "must be 1 to 64 of a-z, 0-9, _ and -, beginning with a letter or digit"


def _inside_project(text: str | None) -> str | None:
    if text is not None:
        try:
            project_path(Path(), text, "")
        except TavError as error:
            raise ValueError(str(error).rpartition(": ")[2]) from None
    return text


def _without_control_characters(text: str) -> str:
    """Refuse characters that terminals, logs and web pages would act on, as prompt CSVs do."""
    if has_control_characters(text):
        raise ValueError("must be a string without control characters")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a string that is not blank")
    return _without_control_characters(text)


AttentionFrame = Literal["first", "former", "self", "middle", "next", "all"]
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
DEVICE_RULE = "must be auto; or cpu, mps, cuda or cuda:NUMBER, or a list of these"
MOST_FRAMES = 100000
FRAMES_RULE = f"must be a whole number between 1 and {MOST_FRAMES}, or all"
Precision = Literal["float32", "bfloat16", "float16"]
DevicePrecision = Literal["auto", "float32", "bfloat16", "float16"]
ImageSide = Annotated[int, Field(ge=64, le=4096, multiple_of=8)]
SamplingSteps = Annotated[int, Field(ge=1, le=1000)]
GuidanceScale = Annotated[float, Field(ge=1, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
PresetName = Literal[
    "tune-a-video",
    "layout",
    "style",
    "attribute",
    "object",
    "background",
    "fatezero",
    "video-p2p",
    "plug-and-play",
    "category",
]
# Kinds of conditions that a model estimates.
ANNOTATED = ("depth", "pose", "segmentation")
Seed = Annotated[int, Field(ge=0, lt=2**63)]
ProjectPath = Annotated[str, AfterValidator(_inside_project)]
OptionalProjectPath = Annotated[str | None, AfterValidator(_inside_project)]
PlainText = Annotated[str, AfterValidator(_without_control_characters)]
Caption = Annotated[str, AfterValidator(_not_blank)]
ClipName = Annotated[str, Field(pattern=f"^{CLIP_NAME}$")]


def _check_frames(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value != "all" and not (is_number and 1 <= value <= MOST_FRAMES):  # type: ignore[operator]  # a number
        raise ValueError(FRAMES_RULE)
    return value


# The outer annotation reports a mistake in one line, the inner one in a line for each type.
FrameCount = Annotated[int | Literal["all"], BeforeValidator(_check_frames)]


class Section(BaseModel):
    """A mapping with fixed keys. Strict: unknown keys are errors, a boolean is not a number, "3" is not 3."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Return whether a field's annotation is a section, rather than the type of a value."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_of_items(annotation: Any) -> type[Section] | None:
    """Return the section that the items of a list are, by a field's annotation; None where it is no such list."""
    for option in (annotation, *get_args(annotation)):
        if get_origin(option) is list and is_section(item := get_args(option)[0]):
            return item
    return None


class AttentionParams(Section):
    """Which frames the spatial attention of each frame reads, and whether there is attention over time."""

    spatial: list[AttentionFrame] = Field(
        ["first", "former"],
        min_length=1,
        max_length=6,
        description="frames that provide each frame's keys and values, in order of concatenation",
    )
    temporal: bool = Field(True, description="attention over time at each position of the latents")


class WindowParams(Section):
    """Windows over a long clip, with which memory does not depend on its length: in tuning, inversion and edits."""

    context_length: int | None = Field(
        None,
        ge=2,
        le=1024,
        description="frames that the network sees at a time; null: all, as for a clip that has no more than these",
    )
    context_stride: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="frames from the start of a window to that of the next, at most context_length; null: half of it",
    )
    anchor: bool = Field(True, description="the clip's first frame comes before every window")
    weighting: Literal["pyramid", "uniform"] = Field(
        "pyramid", description="weights of the predictions where windows overlap; pyramid: largest in a window's middle"
    )

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.context_length and self.context_stride and self.context_stride > self.context_length:
            raise ValueError(f"context_stride must be at most context_length, which is {self.context_length}")
        return self

    def options(self, num_frames: int) -> WindowOptions | None:
        """Return the windows of a clip of so many frames; None where it is not divided."""
        from tav_model.windows import WindowOptions

        if self.context_length is None or num_frames <= self.context_length:
            return None
        return WindowOptions(self.context_length, self.context_stride, self.anchor, self.weighting)


class DecodeParams(Section):
    """Which frames of the clip are used, and at which size."""

    frames: FrameCount = Field(
        32,
        description="number of frames; all: every one from start to end (every stride-th for sampling: stride)",
        json_schema_extra={"allowed": FRAMES_RULE.removeprefix("must be ")},
    )
    width: ImageSide = Field(512, description="width in pixels")
    height: ImageSide = Field(512, description="height in pixels")
    fit: Literal["crop", "pad", "stretch"] = Field("crop", description="how frames of another aspect ratio are fitted")
    sampling: Literal["uniform", "stride"] = Field(
        "uniform", description="uniform: evenly spaced from start to end; stride: every stride-th frame from start"
    )
    start: int = Field(0, ge=0, description="index of the first frame")
    stride: int = Field(1, ge=1, description="distance between frames; only for sampling: stride")
    end: int | None = Field(None, ge=1, description="index after the last frame; null: the end of the clip")


class EncodeParams(Section):
    """How frames become latents."""

    precision: Precision = Field("float32", description="precision of the VAE")


class TuneParams(Section):
    """How the base model is tuned on the clip. The defaults are the paper's settings."""

    steps: int = Field(500, ge=0, le=100000, description="optimizer steps; 0: the base model unchanged")
    learning_rate: float = Field(3e-5, gt=0, le=1, description="peak learning rate of AdamW")
    learning_rate_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="learning rate schedule, by its name in diffusers")
    warmup_steps: int = Field(0, ge=0, le=100000, description="steps until the learning rate reaches its peak")
    accumulation_steps: int = Field(1, ge=1, le=1000, description="backward passes for each optimizer step")
    precision: DevicePrecision = Field(
        "float32",
        description="precision of the forward and backward pass; trained weights stay in float32; auto: bfloat16 where the "
        "hardware has it, otherwise float32",
    )
    max_gradient_norm: float = Field(1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    weight_decay: float = Field(1e-2, ge=0, le=1, description="weight decay of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's mean of the gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's mean of the squared gradients")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="term that AdamW adds to the denominator")
    trainable: list[str] = Field(
        ["attn1.to_q", "attn2.to_q", "attn_temp"],
        min_length=1,
        description="modules of the UNet to train, by the end of their names",
    )
    lora_rank: int = Field(
        0, ge=0, le=256, description="rank of low-rank updates (LoRA) that are trained in their place; 0: their weights"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalized updates of matrices; the learning rate means the same"
    )
    timestep_sampling: Literal["uniform", "stratified", "cubic", "logit-normal"] = Field(
        "uniform",
        description="timesteps to train on; stratified: evenly spread; cubic: more at high noise; logit-normal: more in the "
        "middle",
    )
    motion_weight: Share = Field(
        0.0, description="share of the loss that compares frames with one another rather than alone (MotionDirector)"
    )
    early_stopping: int = Field(
        0, ge=0, le=100000, description="steps without a lower loss on held-out noise after which tuning ends; 0: never"
    )


class InvertParams(Section):
    """How the clip's latents are inverted to noise (DDIM inversion)."""

    steps: SamplingSteps = Field(50, description="DDIM steps")
    prompt: PlainText = Field("", description="prompt during the inversion; empty in the paper")
    precision: DevicePrecision = Field(
        "float32", description="precision of the UNet; the latents stay in float32; auto: as for the tuning"
    )
    method: Literal["plain", "fixed-point"] = Field(
        "plain",
        description="plain: DDIM inversion; fixed-point: each step is iterated until as many steps of ddim lead back exactly",
    )
    iterations: int = Field(5, ge=2, le=50, description="evaluations of the UNet in each step of fixed-point, at most")
    tolerance: float = Field(
        1e-3, gt=0, le=0.1, description="a step of fixed-point ends when the latents change by less than this share"
    )
    regularization: float = Field(
        0.0, ge=0, le=0.5, description="strength by which the predicted noise is kept near white Gaussian noise; 0: off"
    )
    trajectory: Precision = Field(
        "float32", description="precision of the stored trajectory, which masks and presets read the source from"
    )


class EditParams(Section):
    """How edits are sampled. A CSV row may set its own steps, guidance_scale, seed, negative_prompt, preset and mask."""

    steps: SamplingSteps = Field(
        50, description="sampling steps; they start at the noise level where the inversion ended"
    )
    guidance_scale: GuidanceScale = Field(12.5, description="scale of classifier-free guidance; 1: no guidance")
    guidance_start: Share = Field(0.0, description="share of the steps after which guidance begins")
    guidance_end: Share | None = Field(
        None,
        description="share of the steps after which guidance ends; steps without it cost half as much; null: as the preset",
    )
    negative_prompt: PlainText = Field("", description="what the guidance steers away from")
    start: Literal["inverted", "random"] = Field(
        "inverted",
        description="inverted: start from the inverted latents; random: from noise drawn with the row's seed",
    )
    precision: DevicePrecision = Field(
        "float32", description="precision of the UNet; the latents and the VAE stay in float32; auto: as for the tuning"
    )
    sampler: Literal["ddim", "dpm-solver++"] = Field(
        "ddim", description="dpm-solver++ needs about half as many steps as ddim"
    )
    feature_reuse_interval: int = Field(
        1,
        ge=1,
        le=10,
        description="steps from one computation of the deep features to the next (DeepCache); 1: they are always computed",
    )
    preset: PresetName = Field(
        "tune-a-video",
        description="what is taken over from the source, by what is edited or by method; category: by the row's category",
    )
    layout_strength: float | None = Field(
        None,
        ge=0,
        le=4,
        description="strength of the source's layout in the first latents, relative to their noise; null: as the inversion "
        "left it",
    )
    mean_match: Share | None = Field(
        None,
        description="share by which the mean of the first latents becomes that of the clip's latents with noise, which a "
        "coarse inversion misses; null: as the preset",
    )
    deviation_match: Share | None = Field(
        None, description="the same for the deviation of the first latents; null: as the preset"
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the steps that are sampled, the last ones, from the clip's latents at their noise level; null: "
        "as the preset",
    )
    mask: OptionalProjectPath = Field(
        None,
        description="where videos are edited: an image, a folder of images or a video, white on black; words: where the "
        "attention to the changed words is; difference: where the predictions for the prompt and the caption differ; none: no "
        "mask, whatever the preset; null: as the preset",
    )
    mask_inverted: bool = Field(False, description="edit outside of the mask")
    mask_feather: float = Field(
        8,
        ge=0,
        le=256,
        description="pixels around a mask of pixels or from differences in which the edit fades into the source",
    )
    mask_threshold: Share = Field(0.3, description="share of the strongest attention above which words are in the mask")
    difference_threshold: float = Field(
        0.05,
        ge=0,
        le=4,
        description="lowest threshold of masks from differences, in deviations of the clean latents (see the method)",
    )
    cross_replace: Share | None = Field(
        None, description="share of the steps in which shared words keep the source's attention; null: as the preset"
    )
    self_replace: Share | None = Field(
        None,
        description="share of the steps in which self and temporal attention are the source's; null: as the preset",
    )
    fresh_noise: Share | None = Field(
        None,
        description="share of fresh noise in the first latents, within a mask of pixels or from differences, drawn with the "
        "row's seed, so that a new object need not have the shape of the old one; null: as the preset",
    )
    source_negative: Share | None = Field(
        None,
        description="share of the steps in which the caption takes the place of the negative prompt, so that guidance leads "
        "from what the clip shows to what the prompt asks for; null: as the preset",
    )
    source_negative_weight: Share | None = Field(
        None,
        description="weight of the caption in that negative prompt, mixed as embeddings; the rest is the usual negative "
        "prompt, so that what both prompts name is guided too; null: as the preset",
    )
    attention_propagation: Share | None = Field(
        None,
        description="share of the steps in which the outputs of spatio-temporal attention are averaged along the clip's "
        "motion, so that what is new looks alike in all frames; null: as the preset",
    )
    feature_propagation: Share | None = Field(
        None,
        description="the same for the outputs of complete transformer blocks, which ties frames more strongly, and blurs if "
        "it is near 1; null: as the preset",
    )
    proximal_quantile: Share | None = Field(
        None, description="proximal guidance: differences below this quantile are not guided; null: off"
    )
    autoregressive: bool = Field(
        False,
        description="with windows (window.context_length): sample one after the other, each held to the former where they "
        "overlap, so that a long video can be watched while it grows, and resumes there",
    )
    audio: bool = Field(
        True, description="copy the clip's sound into the videos, where all of its frames are used at its own rate"
    )


class ControlParams(Section):
    """A control network that steers the clip, and the condition that it sees: edges, depth or a pose of every frame."""

    kind: Literal["canny", "lineart", "depth", "pose", "segmentation", "given"] = Field(
        description="what the network sees of the frames; given: frames that you have"
    )
    model: ProjectPath = Field(
        description="a ControlNet or T2I-Adapter for the base model: a folder in the project, a name in $TAV_MODELS, or a "
        "hub id"
    )
    scale: float = Field(1.0, ge=0, le=2, description="factor of what the network adds; 0: no control")
    start: Share = Field(0.0, description="share of the sampling steps after which the control begins")
    end: Share = Field(1.0, description="share of the sampling steps after which the control ends")
    guess_mode: bool = Field(
        False, description="for control without a prompt: less of it at upper levels, none under the negative prompt"
    )
    stages: list[Literal["tune", "invert", "edit"]] = Field(
        ["invert", "edit"], min_length=1, max_length=3, description="stages that the control acts in"
    )
    annotator: OptionalProjectPath = Field(
        None,
        description="model that estimates depth, pose or segmentation; null: none, or the exact depth of a clip with a scene "
        "file",
    )
    detector: OptionalProjectPath = Field(
        None, description="model that finds the people for pose; null: one person who fills the frame"
    )
    given: OptionalProjectPath = Field(
        None, description="for kind given: a video, a folder of numbered images or an image in the project"
    )
    source: str | None = Field(
        None, description="another clip, whose frames are annotated instead; null: the clip's own"
    )

    @model_validator(mode="after")
    def _check_agreement(self) -> ControlParams:
        if not self.start < self.end:
            raise ValueError(f"start: {self.start:g} must be less than end, which is {self.end:g}")
        if (self.kind == "given") != (self.given is not None):
            raise ValueError("kind given and a path in given belong together")
        if self.given is not None and self.source is not None:
            raise ValueError("given and source: only one of them is allowed")
        if self.annotator is not None and self.kind not in ANNOTATED:
            raise ValueError(f"annotator: kind {self.kind} needs none; only {', '.join(ANNOTATED)} do")
        if self.annotator is None and self.kind in ("pose", "segmentation"):
            raise ValueError(f"annotator: kind {self.kind} needs a model")
        if self.detector is not None and self.kind != "pose":
            raise ValueError("detector: only kind pose has one")
        return self


def _check_control(control: list[ControlParams] | None) -> list[ControlParams] | None:
    if len({one.guess_mode for one in control or ()}) > 1:
        raise ValueError("guess_mode: must be the same for all networks")
    return control


class ScoreParams(Section):
    """The models that score the edits."""

    clip_model: OptionalProjectPath = Field(
        None, description="a CLIP model; null: only the metrics that work without one"
    )
    pickscore_model: OptionalProjectPath = Field(
        None, description="a PickScore model, such as yuvalkirstain/PickScore_v1; null: no PickScore"
    )


def _check_devices(value: object) -> object:
    if value == "auto":
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise ValueError(DEVICE_RULE)
    if not all(isinstance(name, str) and DEVICE.fullmatch(name) for name in names):
        raise ValueError(DEVICE_RULE)
    return value


# The inner annotation keeps a list on a command line from being read as one string.
Devices = Annotated[Annotated[str, Field(strict=True)] | list[str], BeforeValidator(_check_devices)]


class RuntimeParams(Section):
    """Settings that affect only speed and memory; results differ by rounding at most."""

    device: Devices = Field(
        "auto",
        description="device that runs the networks; auto: every GPU, or the CPU; a list: devices to use side by side",
        json_schema_extra={"allowed": DEVICE_RULE.removeprefix("must be ")},
    )
    decode_chunk: int = Field(8, ge=1, le=1024, description="frames that the VAE processes at a time")
    checkpoint_every: int = Field(50, ge=1, le=100000, description="tuning steps between two checkpoints")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass instead of storing them"
    )
    compile: bool = Field(
        False, description="compile the network with torch.compile: slower to start, faster steps; rounds differently"
    )
    deterministic: bool = Field(
        True,
        description="tuning on a GPU is bit-identical in every run; false: faster, by a third on an H100, and runs differ by "
        "rounding",
    )
    edit_batch: int = Field(1, ge=1, le=64, description="prompts sampled together in one batch")
    ray: str | None = Field(
        None,
        pattern=r"^(local|(ray://)?[\w.-]+:\d{1,5})$",
        description="Ray cluster that renders the rows of the Prefect flow; null: no Ray",
        json_schema_extra={"allowed": "local, HOST:PORT, ray://HOST:PORT or null"},
    )
    ray_gpus: float = Field(1.0, gt=0, le=64, description="share of a GPU that each row requests from Ray")


class TrackingParams(Section):
    """Where runs are logged."""

    uri: str | None = Field("sqlite:///mlflow.db", description="MLflow tracking URI; null: no tracking")
    experiment: str = Field("tav", min_length=1, max_length=200, description="MLflow experiment")
    log_model: bool = Field(True, description="log the tuned weights as a model that mlflow.pyfunc loads")


Control = Annotated[list[ControlParams], AfterValidator(_check_control)]
OptionalControl = Annotated[list[ControlParams] | None, AfterValidator(_check_control)]
CONTROL_RULE: dict[str, Any] = {"allowed": "a list of mappings, such as [{kind: canny, model: PATH}]"}


def _own(section: type[Section]) -> Any:
    """Return the type of a clip's own settings of a section: the same fields, each optional.

    Only keys that the file sets count (`model_fields_set`): the default None means "not set", and is allowed in the file
    only where the section allows it, as for `decode.end`.
    """
    fields: dict[str, Any] = {
        name: (field.rebuild_annotation(), Field(None, description=field.description))
        for name, field in section.model_fields.items()
    }
    return create_model(section.__name__.replace("Params", "Overrides"), __base__=Section, **fields)


if TYPE_CHECKING:
    AttentionOverrides: TypeAlias = Section
    WindowOverrides: TypeAlias = Section
    DecodeOverrides: TypeAlias = Section
    EncodeOverrides: TypeAlias = Section
    TuneOverrides: TypeAlias = Section
    InvertOverrides: TypeAlias = Section
    EditOverrides: TypeAlias = Section
    ScoreOverrides: TypeAlias = Section
else:
    AttentionOverrides = _own(AttentionParams)
    WindowOverrides = _own(WindowParams)
    DecodeOverrides = _own(DecodeParams)
    EncodeOverrides = _own(EncodeParams)
    TuneOverrides = _own(TuneParams)
    InvertOverrides = _own(InvertParams)
    EditOverrides = _own(EditParams)
    ScoreOverrides = _own(ScoreParams)


class ClipParams(Section):
    """A clip: its video, its caption and its edits, and the settings that it does not share with the other clips."""

    video: ProjectPath = Field(description="a video, or a folder of numbered images, inside the project")
    caption: Caption = Field(description="description of the video, which the model is tuned on")
    prompts: ProjectPath = Field(description="a CSV of edits, inside the project")
    base_model: OptionalProjectPath = Field(None, description="this clip's base model; null: the common one")
    seed: Seed | None = Field(None, description="this clip's seed; null: the common one")
    control: OptionalControl = Field(
        None,
        description="this clip's control networks; null: the common ones, `[]`: none",
        json_schema_extra=CONTROL_RULE,
    )
    decode: DecodeOverrides = Field(DecodeOverrides(), description="this clip's own settings of the section decode")
    attention: AttentionOverrides = Field(
        AttentionOverrides(), description="this clip's own settings of the section attention"
    )
    window: WindowOverrides = Field(WindowOverrides(), description="this clip's own settings of the section window")
    encode: EncodeOverrides = Field(EncodeOverrides(), description="this clip's own settings of the section encode")
    tune: TuneOverrides = Field(TuneOverrides(), description="this clip's own settings of the section tune")
    invert: InvertOverrides = Field(InvertOverrides(), description="this clip's own settings of the section invert")
    edit: EditOverrides = Field(EditOverrides(), description="this clip's own settings of the section edit")
    score: ScoreOverrides = Field(ScoreOverrides(), description="this clip's own settings of the section score")


class Params(Section):
    """The contents of params.yaml.

    The sections that DVC watches are required even where they are empty, because DVC looks them up in the file.
    """

    base_model: ProjectPath = Field(description="a folder in the project, a name in $TAV_MODELS, or a hub id")
    seed: Seed = Field(description="seed of all random numbers")
    control: Control = Field(
        [], description="networks that steer clips by edges, depth, ...", json_schema_extra=CONTROL_RULE
    )
    attention: AttentionParams = Field(description="frames that attention reads")
    decode: DecodeParams = Field(description="frames of the clip, and their size")
    window: Annotated[WindowParams, BeforeValidator(lambda value: {} if value is None else value)] = Field(
        WindowParams(), description="windows over long clips"
    )
    encode: EncodeParams = Field(description="frames to latents")
    tune: TuneParams = Field(description="tuning of the base model on the clip")
    invert: InvertParams = Field(description="DDIM inversion")
    edit: EditParams = Field(description="sampling of the edits")
    score: ScoreParams = Field(description="models that score the edits")
    runtime: RuntimeParams = Field(RuntimeParams(), description="settings that affect only speed and memory")
    tracking: TrackingParams = Field(TrackingParams(), description="where runs are logged")
    clips: dict[ClipName, ClipParams] = Field(min_length=1, description="the clips, by name")

    def clip(self, name: str) -> ClipParams:
        """Return the entry of one clip.

        Raises:
            TavError: no clip has this name.
        """
        if name not in self.clips:
            raise TavError(f"params.yaml: clips: no clip named {name!r}; there are: {', '.join(self.clips)}")
        return self.clips[name]

    def for_clip(self, name: str) -> Params:
        """Return the parameters that apply to one clip: its own settings replace those of the sections.

        Raises:
            TavError: no clip has this name.
        """
        clip = self.clip(name)
        sections: dict[str, Any] = {}
        for key in RESULT_SECTIONS:
            common, own = getattr(self, key), getattr(clip, key)
            if isinstance(common, Section):
                values = with_own_settings(dict(common), own.model_dump(exclude_unset=True))
                sections[key] = common.model_copy(update=values)
                if key == "window":
                    _check_window(name, values)
            else:
                sections[key] = with_own_settings(common, own)
        return self.model_copy(update=sections)


def _check_window(clip: str, values: dict[str, Any]) -> None:
    """Check a clip's own settings together with the common ones, which may not fit each other."""
    try:
        WindowParams(**values)
    except ValueError as error:
        reason = str(error.errors()[0]["msg"] if isinstance(error, ValidationError) else error)
        raise TavError(f"params.yaml: clips.{clip}.window: {reason.removeprefix('Value error, ')}") from None
