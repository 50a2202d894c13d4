"""AdamW for everything, or Muon for the trunk's matrices and AdamW for the rest.

Muon (K. Jordan 2024; torch.optim.Muon) makes the update of a matrix orthogonal. Its rate is scaled
as in Moonlight (arXiv 2502.16982, section 2.2), so that AdamW's learning rates and schedules hold.

What this leaves out on purpose: optimisers of our own.
"""

from inspect import unwrap
from itertools import chain

import torch
from torch import nn

from model import Transformer
from step import kernels


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


class KernelAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with a step that is one call of kernels.c; its state is torch's. For float32 on a CPU."""

    # what torch wraps these in imports its compiler first, which takes over a second
    add_param_group, load_state_dict, state_dict, zero_grad = (
        unwrap(getattr(torch.optim.AdamW, name))
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            for p in learning:
                if not self.state[p]:
                    self.state[p] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            states = [self.state[p] for p in learning]
            moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
            kernels.adamw(learning, *moments, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})


def clip_gradients(optimizer: torch.optim.Optimizer | Together, most: float) -> torch.Tensor:
    """The norm of all gradients, a scalar; they are scaled in place so that it is at most `most`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clip = kernels.clip_gradients if isinstance(optimizer, KernelAdamW) else torch.nn.utils.clip_grad_norm_
    return clip(parameters, most)


def adamw(s, parameters: list[nn.Parameter], by_kernels: bool) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    kind = KernelAdamW if by_kernels else torch.optim.AdamW
    return kind(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)


def make_optimizer(s, model: Transformer) -> torch.optim.AdamW | Together:
    """Over every parameter, heads included. s: has optimizer, learning_rate, beta1, beta2, weight_decay."""
    by_kernels = (isinstance(model, kernels.KernelTransformer)
                  and all(p.dtype == torch.float32 for p in model.parameters()))
    if s.optimizer == "adamw":
        return adamw(s, list(model.parameters()), by_kernels)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    muon = torch.optim.Muon(matrices, lr=s.learning_rate, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together(muon=muon, adamw=adamw(s, [p for p in model.parameters() if id(p) not in chosen], by_kernels))
