"""What a classifier's accuracy does not say: calibration, and accuracy under attack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_samix.data.images import ImageSet
from ssl_samix.evaluation.classifier import TrainedClassifier

BINS = 15  # of confidence (arXiv 1706.04599, section 5)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in percent (arXiv 1706.04599, equation 3).

    The mean, over bins of equal width in confidence, of how far accuracy is from confidence, each
    bin weighted by its images.

    Args:
        logits: (N, C).
        labels: (N,).
        bins: Number of bins.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    gap = (predicted == labels).double() - confidence
    # The last bin is closed on both sides, all others on their upper side.
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add(0, index, gap)
    return 100 * sums.abs().sum().item() / len(labels)


def attacked_logits(
    classifier: TrainedClassifier,
    images: ImageSet,
    strength: float,
    device: torch.device,
    chunk: int = 512,
) -> Tensor:
    """Return logits under the fast gradient sign attack (arXiv 1412.6572), (N, C) on the CPU.

    Every pixel moves by ``strength``, of values in [0, 1], to where the cross-entropy of the true
    class grows, and stays a pixel.

    Args:
        classifier: In eval mode, on ``device``; its weights gather no gradient.
        images: Labelled images, un-augmented.
        strength: Such as 8 / 255.
        device: Where.
        chunk: Images per pass.
    """
    mean, std = (
        torch.tensor(v, device=device)[:, None, None] for v in (classifier.mean, classifier.std)
    )
    rows = []
    for begin in range(0, len(images), chunk):
        picks = range(begin, min(begin + chunk, len(images)))
        pixels = images.load(list(picks)).to(device).float().div_(255).requires_grad_(True)
        loss = F.cross_entropy(
            classifier((pixels - mean) / std), images.labels[begin : picks.stop].to(device)
        )
        (slope,) = torch.autograd.grad(loss, pixels)
        with torch.no_grad():
            moved = (pixels + strength * slope.sign()).clamp_(0, 1)
            rows.append(classifier((moved - mean) / std).float().cpu())
    return torch.cat(rows)
