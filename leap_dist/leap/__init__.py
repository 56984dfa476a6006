"""The Leap algorithm in pure PyTorch."""
