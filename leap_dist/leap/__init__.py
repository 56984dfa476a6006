"""The Leap algorithm in pure PyTorch."""

from leap_dist.leap.pull_forward import PullForward as PullForward
