"""Models with a likelihood: nats per image."""

from typing import Any

import torch
from tqdm import tqdm


def likelihood_measures(model: Any, images: torch.Tensor) -> dict[str, Any]:
    """Mean log-likelihood in nats of binarised images [N, 1, 28, 28] with its standard error over the images.

    kind: what the value is, exact, a lower bound or an estimate. A model with `log_partition` also gets log Z,
    estimated from below (forward) and from above (reverse).
    """
    torch.manual_seed(0)  # of a VAE's samples of z
    measures: dict[str, Any] = {"kind": getattr(model, "likelihood", "as the model computes it")}
    given = {}
    if hasattr(model, "log_partition"):
        print("estimating log Z by annealed importance sampling, which takes minutes")
        generator = torch.Generator(images.device).manual_seed(0)
        (forward, forward_error), (reverse, reverse_error) = model.log_partition(generator=generator)
        measures.update(log_z=forward, log_z_error=forward_error, log_z_reverse=reverse)
        measures.update(log_z_reverse_error=reverse_error)
        given["log_z"] = forward
    parts = tqdm(images.split(500), desc="log-likelihood", leave=False, disable=None)  # None: in a terminal only
    scores = torch.cat([model.log_likelihood(part, **given) for part in parts])
    measures["log_likelihood"] = scores.mean().item()
    measures["log_likelihood_error"] = (scores.std() / len(scores) ** 0.5).item()
    if given:  # AIS from below makes Z too small and the likelihood too high; the reverse errs the other way
        measures["log_likelihood_reverse"] = measures["log_likelihood"] + forward - reverse
    return measures


def print_likelihood(measures: dict[str, Any]) -> None:
    value, error = measures["log_likelihood"], measures["log_likelihood_error"]
    print(f"log-likelihood of the binarised test images: {value:.2f} ± {error:.2f} nats ({measures['kind']})")
    if "log_z" in measures:
        print(
            f"log Z {measures['log_z']:.2f} ± {measures['log_z_error']:.2f} by AIS, "
            f"{measures['log_z_reverse']:.2f} ± {measures['log_z_reverse_error']:.2f} by reverse AIS, "
            f"with which the log-likelihood is {measures['log_likelihood_reverse']:.2f} nats"
        )
