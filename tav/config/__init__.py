"""What a project is configured with: params.yaml as checked parameters, prompt CSVs, and where files are.

Import everything about params.yaml from here: `from tav.config import Params, load_params`. `tav.config.schema` defines
the keys; prompt CSVs, paths and stage names have modules of their own.
"""

from tav.config.clip_settings import RESULT_SECTIONS, no_own_settings
from tav.config.loading import load_params, parse_params
from tav.config.overrides import overrides_of_clips, parse_overrides
from tav.config.rewriting import add_clip, complete_keys, write_overrides
from tav.config.schema import (
    CLIP_NAME,
    CLIP_NAME_RULE,
    AttentionParams,
    ClipParams,
    ControlParams,
    DecodeParams,
    EditParams,
    EncodeParams,
    InvertParams,
    Params,
    RuntimeParams,
    ScoreParams,
    TrackingParams,
    TuneParams,
    WindowParams,
)

__all__ = [
    "CLIP_NAME",
    "CLIP_NAME_RULE",
    "RESULT_SECTIONS",
    "AttentionParams",
    "ClipParams",
    "ControlParams",
    "DecodeParams",
    "EditParams",
    "EncodeParams",
    "InvertParams",
    "Params",
    "RuntimeParams",
    "ScoreParams",
    "TrackingParams",
    "TuneParams",
    "WindowParams",
    "add_clip",
    "complete_keys",
    "load_params",
    "no_own_settings",
    "overrides_of_clips",
    "parse_overrides",
    "parse_params",
    "write_overrides",
]
