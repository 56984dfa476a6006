"""CleanRL's Atari agent with this encoder as its network: copy the class to ppo_atari.py, or import it.

All names are CleanRL's: network.N, actor, critic, get_value, get_action_and_value. `python agent.py` shows the agent.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Categorical

WEIGHTS = Path(__file__).with_name("agent.safetensors")


def layer_init(layer: nn.Linear, std: float) -> nn.Linear:
    """Set orthogonal weights with gain `std`, and zero biases."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The meta-learned network with a new actor and critic. Observations are uint8 (N, C, 84, 84)."""

    def __init__(self, envs: Any, weights: str | Path = WEIGHTS) -> None:
        super().__init__()
        initialization = load_file(weights)
        self.network = nn.Sequential(
            nn.Conv2d(initialization["network.0.weight"].shape[1], 16, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 9 * 9, 256),
            nn.ReLU(),
        )
        self.load_state_dict(initialization)  # before the heads exist, so that all names match
        self.actor = layer_init(nn.Linear(256, int(envs.single_action_space.n)), std=0.01)
        self.critic = layer_init(nn.Linear(256, 1), std=1.0)

    def get_value(self, x: Tensor) -> Tensor:
        """Return the values (N, 1)."""
        value: Tensor = self.critic(self.network(x / 255.0))
        return value

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return actions (N,), sampled unless given, their log-probabilities (N,), entropies (N,) and values (N, 1)."""
        features = self.network(x / 255.0)
        policy = Categorical(logits=self.actor(features))
        chosen = policy.sample() if action is None else action
        return chosen, policy.log_prob(chosen), policy.entropy(), self.critic(features)


if __name__ == "__main__":
    print(Agent(SimpleNamespace(single_action_space=SimpleNamespace(n=18))))
