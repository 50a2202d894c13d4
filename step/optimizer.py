"""AdamW for everything, or Muon for the trunk's matrices and AdamW for the rest.

Muon (K. Jordan 2024; torch.optim.Muon) makes the update of a matrix orthogonal. Its rate is scaled
as in Moonlight (arXiv 2502.16982, section 2.2), so that AdamW's learning rates and schedules hold.

What this leaves out on purpose: optimisers of our own.
"""

from itertools import chain

import torch
from torch import nn

from model import Transformer


class Together:
    """Several optimisers as one: what train.py and GradScaler ask of an optimiser."""

    def __init__(self, **optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return list(chain.from_iterable(o.param_groups for o in self.optimizers.values()))

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """{name: its state_dict}."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        """Errors: KeyError where the state is of other optimisers."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def adamw(s, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)


def make_optimizer(s, model: Transformer) -> torch.optim.AdamW | Together:
    """Over every parameter, heads included. s: has optimizer, learning_rate, beta1, beta2, weight_decay."""
    if s.optimizer == "adamw":
        return adamw(s, list(model.parameters()))
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    muon = torch.optim.Muon(matrices, lr=s.learning_rate, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together(muon=muon, adamw=adamw(s, [p for p in model.parameters() if id(p) not in chosen]))
