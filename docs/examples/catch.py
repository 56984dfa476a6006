"""Catch in many sizes."""

import gymnasium
import numpy as np


class Catch(gymnasium.Env):
    """A ball falls, and a paddle below has to be there."""

    def __init__(self, size):
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(3)
        self.size = size

    def reset(self, *, seed=None, options=None):
        """Put the ball into a random column at the top."""
        super().reset(seed=seed)
        self.ball = np.array([0, self.np_random.integers(self.size)])
        self.paddle = self.size // 2
        return self.image(), {}

    def step(self, action):
        """Move the paddle left (0), not at all (1) or right (2), and let the ball fall."""
        self.paddle = int(np.clip(self.paddle + action - 1, 0, self.size - 1))
        self.ball[0] += 1
        over = bool(self.ball[0] == self.size - 1)
        caught = abs(self.ball[1] - self.paddle) <= 1
        return self.image(), (1.0 if caught else -1.0) if over else 0.0, over, False, {}

    def image(self):
        """Draw the ball white and the paddle green."""
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[tuple(self.ball)] = 255
        image[-1, max(0, self.paddle - 1) : self.paddle + 2] = (0, 255, 0)
        return image


for size in range(8, 25):
    gymnasium.register(f"Catch{size}-v0", Catch, kwargs={"size": size}, max_episode_steps=100)
