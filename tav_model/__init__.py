"""Tune-A-Video as a library: an image diffusion model inflated to video, tuned on one clip, inverted and edited.

The public names load on first use, because torch and diffusers take seconds to import.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "BasicTransformerBlock": "networks.transformer",
    "SparseCausalAttention": "networks.attention",
    "Transformer3DModel": "networks.transformer",
    "Downsample3D": "networks.resnet",
    "InflatedConv3d": "networks.resnet",
    "ResnetBlock3D": "networks.resnet",
    "Upsample3D": "networks.resnet",
    "UNet3DConditionModel": "networks.unet",
    "ControlSignal": "control",
    "load_control_network": "control_networks",
    "ddim_inversion": "inversion",
    "TuneAVideoPipeline": "pipeline",
    "Tuner": "tuning",
    "TuningConfig": "tuning",
    "WindowOptions": "windows",
    "TavError": "errors",
    "encode_frames": "latents",
    "encode_prompts": "text",
    "read_video": "video",
    "write_video": "video",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
