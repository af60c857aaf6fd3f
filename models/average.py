"""Averaged weights: what a training ends with when its last steps are still noisy."""

import copy

import torch


class Average:
    """Exponential moving average of a network's weights and of batch norm's statistics, as the network `self.model`.

    average = d * average + (1 - d) * weights, with d rising from .1 to `decay` as (1 + updates) / (10 + updates),
    so that the first random weights are soon forgotten.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model):
        keep = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)  # stays on the device
        self.updates += 1
        for mine, its in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if its.is_floating_point():
                mine.lerp_(its, 1 - keep)
            else:
                mine.copy_(its)  # batch norm's count of batches

    def state_dict(self):
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.updates.copy_(state["updates"])
