"""Train an agent from the initialization: python example.py [GAME] [STEPS], by default Breakout for 20,000 steps."""

import sys

import environments
import gymnasium
from features_extractor import LeapPolicy
from stable_baselines3 import A2C

game = sys.argv[1] if len(sys.argv) > 1 else "Breakout"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
try:
    envs = environments.make(game, 16)
except gymnasium.error.Error as error:
    sys.exit(f"example.py: {game}: {error}")
agent = A2C(LeapPolicy, envs, n_steps=5, ent_coef=0.01, vf_coef=0.25, verbose=1)
agent.learn(steps)
agent.save(f"a2c-{game}")
returns = [episode["r"] for episode in agent.ep_info_buffer or ()]
mean = (
    f"mean return {sum(returns) / len(returns):.1f} in the last {len(returns)} episodes"
    if returns
    else "no episode ended"
)
print(f"{game}: {agent.num_timesteps} steps, {mean}; the agent is in a2c-{game}.zip")
