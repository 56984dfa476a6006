"""Load the encoder with only torch and safetensors: `encoder = load()`. `python load.py` shows it."""

from collections import OrderedDict
from pathlib import Path

from safetensors.torch import load_file
from torch import nn, zeros

WEIGHTS = Path(__file__).with_name("encoder.safetensors")


def load(path: str | Path = WEIGHTS) -> nn.Sequential:
    """Return the encoder: frames (N, C, 84, 84), float32 in [0, 1], to features (N, 256).

    preprocessing.json describes the frames.
    """
    tensors = load_file(path)
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(tensors["conv1.weight"].shape[1], 16, kernel_size=8, stride=4),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, kernel_size=4, stride=2),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "linear": nn.Linear(32 * 9 * 9, 256),
        "relu3": nn.ReLU(),
    }
    encoder = nn.Sequential(OrderedDict(layers))
    encoder.load_state_dict(tensors)
    return encoder


if __name__ == "__main__":
    encoder = load()
    channels = encoder.get_parameter("conv1.weight").shape[1]
    features = encoder(zeros(1, channels, 84, 84))
    print(encoder)
    print(f"frames (1, {channels}, 84, 84) become features {tuple(features.shape)}")
