"""Train an agent from the initialization: python example.py Breakout 100000."""

import sys

import environments
from features_extractor import LeapPolicy
from stable_baselines3 import A2C

_, game, steps = sys.argv
agent = A2C(LeapPolicy, environments.make(game, 16), n_steps=5, ent_coef=0.01, vf_coef=0.25, verbose=1)
agent.learn(int(steps))
agent.save(f"a2c-{game}")
