"""ORZ's critic: the reward minus a learned value of each prefix, under policy mirror descent's loss, not PPO's.

Gamma and lambda are 1; values are from before the critic learns from the claim. Source: arXiv:2503.24290.
"""

import torch

from pmdflow.learner.algorithms import Algorithm, Credit
from pmdflow.learner.losses import pmd_tokens
from pmdflow.learner.scorers.model import ScoringModel, TrainedScorer, packed
from pmdflow.learner.scorers.protocol import ColumnSpec


def value_loss(values, before, returns, clip=0.2):
    """Half the squared error, the worse of the value and its clipped move [P]."""
    return 0.5 * torch.maximum((values - returns) ** 2, (before + (values - before).clamp(-clip, clip) - returns) ** 2)


class Critic(TrainedScorer):
    """A value head, 0 at first, on a model of its own."""

    columns = (ColumnSpec(name="value", dtype="float32"),)

    def __init__(self, setup):
        self.updates, self.model = int(setup.settings.get("updates", 12)), ScoringModel(setup)
        self.head = torch.nn.Linear(self.model.hidden_size, 1, bias=False).to(setup.device)
        torch.nn.init.zeros_(self.head.weight)
        super().__init__(self.model.policy.model.get_decoder(), self.head, lr=float(setup.settings.get("lr", 5e-6)))

    @torch.no_grad()
    def score(self, batch):
        """The value of the prefix that each token was drawn after."""
        return {"value": packed(self.head(hidden)[:, 0] for _, hidden in self.model.hidden(batch))}

    def learn(self, batch, outcome):
        """So many steps towards the reward."""
        losses, before = [], torch.from_numpy(self.score(batch)["value"]).to(self.head.weight.device)
        returns = torch.from_numpy(outcome.rewards[batch.sequences]).to(before)
        for _ in range(self.updates):
            for place, hidden in self.model.hidden(batch):
                losses.append(value_loss(self.head(hidden)[:, 0], before[place], returns[place]).sum())
                losses[-1].backward()
            self.step(outcome, len(before))
        return {"value_loss": sum(loss.item() for loss in losses) / max(self.updates * len(before), 1)}


def totals(view, learner):
    """Sums for mean and deviation over the claim."""
    own = view.rewards[view.episodes] - view.columns["value"]
    return {"count": float(len(own)), "sum": float(own.sum()), "squares": float((own**2).sum())}


def credit(view, learner, state):
    """Reward minus value, normalized over the claim."""
    own, count = view.rewards[view.episodes] - view.columns["value"], max(view.totals["count"], 1)
    mean = view.totals["sum"] / count
    return Credit(values=(own - mean) / (max(view.totals["squares"] / count - mean**2, 0) ** 0.5 + 1e-8), per="token")


ORZ = Algorithm(credit=credit, loss=pmd_tokens, columns=frozenset({"value"}), totals=totals)
