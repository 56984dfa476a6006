"""Encoders of other libraries, saved as safetensors under their own parameter names.

Only encoders of the paper's shape can be read: convolutions 16·8×8/4 and 32·4×4/2 and a linear layer of 256 features,
as in an agent that was trained with this package's export. The larger network that Stable-Baselines3's CnnPolicy and
CleanRL's agents have by default is different, and is refused with a message that gives its shapes.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from safetensors.numpy import load

from leap_dist.nn.actor_critic import FRAME_SIZE, SCALE
from leap_dist.storage.atomic import DECODE_ERRORS, one_line

_LAYERS = ("conv1", "conv2", "linear")
_PATTERNS = {
    "Stable-Baselines3": r"(policy\.)?(pi_)?features_extractor\.(conv1|conv2|linear|cnn\.\d|linear\.0)\.weight",
    "CleanRL": r"(agent\.)?network\.\d\.weight",
    "PyTorch": r"(encoder\.)?(conv1|conv2|linear)\.weight",
}
"""Parameter names of the libraries' encoders."""
_FRAMES = {4: "gray4", 3: "rgb1", 12: "rgb4"}
_SHAPES = {"conv1": (16, None, 8, 8), "conv2": (32, 16, 4, 4), "linear": (256, 32 * 9 * 9)}


def read(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return tensors by our names, and metadata as in an init.safetensors.

    Raises ValueError, in one line, if the file holds no encoder of the paper's shape.
    """
    try:
        found = load(data)
    except DECODE_ERRORS as error:
        raise ValueError(f"it is not a safetensors file: {one_line(error)}") from None
    library, layers = _encoder(found)
    tensors = {}
    for name, (prefix, expected) in zip(_LAYERS, zip(layers, _SHAPES.values(), strict=True), strict=True):
        weight, bias = (found[f"{prefix}.{kind}"] for kind in ("weight", "bias"))
        fits = len(weight.shape) == len(expected) and all(
            wanted in (None, size) for size, wanted in zip(weight.shape, expected, strict=True)
        )
        if not fits or bias.shape != weight.shape[:1]:
            shape = tuple("C" if size is None else size for size in expected)
            raise ValueError(
                f"{prefix}.weight of the {library} encoder is {weight.shape}, not {shape}: only the paper's encoder "
                "can be compared here, not a larger one such as NatureCNN"
            )
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (array.astype(np.float32) for array in (weight, bias))
    channels = tensors["conv1.weight"].shape[1]
    if channels not in _FRAMES:
        raise ValueError(f"the {library} encoder takes {channels} channels; frames have {', '.join(map(str, _FRAMES))}")
    frames = _FRAMES[channels]
    return tensors, {
        "version": 0,
        "preset": "fast" if frames == "gray4" else "paper",
        "meta_learner": f"none: imported from {library}",
        "shared": "encoder",
        "games": [],
        "preprocessing": {"frames": frames, "size": FRAME_SIZE, "frame_skip": 4, "scale": SCALE},
    }


def _encoder(found: dict[str, np.ndarray]) -> tuple[str, list[str]]:
    """Return the library, and the prefixes of the names of the first three layers in order. Raises ValueError."""
    for library, pattern in _PATTERNS.items():
        layers = {name.removesuffix(".weight") for name in found if re.fullmatch(pattern, name)}
        ordered = sorted(layers, key=lambda name: (found[f"{name}.weight"].ndim == 2, name))
        if len(ordered) >= len(_LAYERS) and all(f"{name}.bias" in found for name in ordered):
            linear = next((name for name in ordered if found[f"{name}.weight"].ndim == 2), ordered[-1])
            return library, [*ordered[:2], linear]
    names = ", ".join(sorted(found)[:4])
    raise ValueError(f"no encoder of Stable-Baselines3, CleanRL or PyTorch is among its tensors ({names[:120]})")
