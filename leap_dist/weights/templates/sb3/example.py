"""Show that the encoder works with a game, or train an agent from it: python example.py [GAME] [--train [STEPS]]."""

import argparse
import sys

import environments
import gymnasium
import numpy
from features_extractor import LeapPolicy
from stable_baselines3 import A2C

parser = argparse.ArgumentParser(description="Show that the encoder works with a game, or train an agent from it.")
parser.add_argument("game", nargs="?", default="Breakout", help="name of a game as in ALE/NAME-v5 (default: Breakout)")
parser.add_argument("--train", nargs="?", type=int, const=20_000, metavar="STEPS", help="train (default: 20000 steps)")
asked = parser.parse_args()
game, steps = asked.game, asked.train
try:
    envs = environments.make(game, 16 if steps else 1)
except gymnasium.error.Error as error:
    sys.exit(f"example.py: {game}: {error}")
agent = A2C(LeapPolicy, envs, n_steps=5, ent_coef=0.01, vf_coef=0.25, verbose=1)
if not steps:
    observations = numpy.asarray(envs.reset())
    actions, _ = agent.predict(observations)
    print(f"{game}: for observations of shape {observations.shape}, the agent chooses the action {actions[0]}")
    print(f"to train it: python example.py {game} --train")
    sys.exit()
agent.learn(steps)
agent.save(f"a2c-{game}")
returns = [episode["r"] for episode in agent.ep_info_buffer or ()]
mean = (
    f"mean return {sum(returns) / len(returns):.1f} in the last {len(returns)} episodes"
    if returns
    else "no episode ended"
)
print(f"{game}: {agent.num_timesteps} steps, {mean}; the agent is in a2c-{game}.zip")
