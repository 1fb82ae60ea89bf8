"""Color jitter of batches, each sample with its own strength: torchvision's formulas in few passes over memory."""

import torch
from jaxtyping import Float32
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def blend(
    samples: Float32[Tensor, "batch 3 h w"],
    keep: Float32[Tensor, "batch 1 1 1"],
    gray: Float32[Tensor, "batch 1 1 1"],
    mean: Float32[Tensor, "batch 1 1 1"],
    *,
    needs_gray: bool,
) -> None:
    """Blend each sample with black, its gray version or its mean gray, and clamp to [0, 1]; in place.

    Brightness blends with black (`keep` is the factor), saturation with gray (`gray` is 1 - factor), contrast with
    mean gray (`mean` is 1 - factor).

    Args:
        samples: Images in [0, 1].
        keep: Weight of the image.
        gray: Weight of its gray version.
        mean: Weight of the mean of that.
        needs_gray: False promises that all of `gray` and `mean` are 0.
    """
    if not needs_gray:
        samples.mul_(keep).clamp_(0, 1)
        return
    red, green, blue = (samples[:, channel : channel + 1] for channel in range(3))
    other = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    # By rows and then by columns: one long sum would be cut differently for each number of threads.
    average = other.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)
    other.mul_(gray).add_(average * mean)
    torch.addcmul(other, samples, keep, out=samples).clamp_(0, 1)


def turn_hue(samples: Float32[Tensor, "batch 3 h w"], turn: Float32[Tensor, "batch 1 1 1"]) -> None:
    """Turn the hue of each sample by a share of the color circle, as by way of HSV; in place.

    With M and m the largest and smallest channel of a pixel and C = M - m, the distance of its hue from red is
    |H| = 1 + (g + b - r - m) / C, in sixths of the circle, and H has the sign of g - b. A channel at place p of the
    circle then is M - C max(0, min(1, |H - p| - 1)). No step has to choose between cases, which costs most on a CPU.
    """
    red, green, blue = (samples[:, channel : channel + 1] for channel in range(3))
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    high, low = torch.maximum(high, blue, out=high), torch.minimum(low, blue, out=low)
    chroma = high - low
    hue = torch.add(green, blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    hue.copysign_(green - blue).add_(6 * turn)
    hue.sub_((hue * (1 / 6)).floor_(), alpha=6)
    # Red lies at 0 and at 6: it is measured from the opposite side.
    torch.addcmul(low, hue.sub(3).abs_().sub_(1).clamp_(0, 1), chroma, out=red)
    torch.addcmul(high, hue.sub(2).abs_().sub_(1).clamp_(0, 1), chroma, value=-1, out=green)
    torch.addcmul(high, hue.sub_(4).abs_().sub_(1).clamp_(0, 1), chroma, value=-1, out=blue)
