"""Whether an encoder answers the same twice: a certificate of one that does not would say nothing."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssl_exit.errors import InputError

IMAGES, ALONE = 16, 4  # of a batch, and of these one by one
TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}  # difference of features / their norm; kernels round by batch size


def check_repeatable(
    module: nn.Module,
    features: Callable[[Tensor], Tensor],
    own_features: Callable[[Tensor], Tensor],
    images: Tensor,
    precision: str,
) -> None:
    """Refuse an encoder whose features of an image depend on more than the image.

    The same batch is run twice, in reverse order, some of its images alone, and twice by the encoder as it is, which
    tracing may have fixed in one state; features may differ by at most 1 % of their norm (bfloat16: 5 %).

    Args:
        module: the encoder, searched for the likely reason.
        features: images as they come from the data to final features, (N, C, H, W) -> (N, F).
        own_features: the same by the encoder as it is, neither traced nor rewritten.
        images: some, (N, C, H, W).
        precision: "float32" or "bfloat16".

    Raises:
        InputError: features differ; the message says when, and what may be the reason.
    """
    x = images[:IMAGES]

    def alone() -> Tensor:
        return torch.cat([features(one.clone()) for one in x[:ALONE].split(1)])

    with torch.inference_mode():
        first = features(x.clone())
        trials: dict[str, Callable[[], Tensor]] = {
            "when the same batch runs twice": lambda: features(x.clone()),
            "alone and in a batch": alone,
            "in another order of the batch": lambda: features(x.flip(0)).flip(0),
            "as it is and cut into stages": lambda: own_features(x.clone()),
            "as it is, run again, and cut into stages": lambda: own_features(x.clone()),
        }
        for when, trial in trials.items():
            try:
                again = trial()
            except (RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise InputError(f"the encoder fails on some images of a batch that it takes: {reason}") from error
            expected = first[: len(again)].float()
            usable = expected.isfinite().all(1)  # the others are skipped
            far = (again.float().to(expected.device) - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)
            worst = far[usable].nan_to_num(nan=math.inf).max().item() if usable.any() else 0.0
            if worst > TOLERANCE[precision]:
                raise InputError(
                    f"the encoder gives an image other features {when} (they differ by {worst:.0%}), so nothing can be "
                    f"certified of its answers; {_likely_reason(module)}"
                )


def _likely_reason(module: nn.Module) -> str:
    for name, part in module.named_modules():
        if part.training:
            return f"{name or type(module).__name__!r} is in training mode: call encoder.eval()"
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            return (
                f"{name!r} is a batch normalisation without running statistics: train it with track_running_stats=True"
            )
    return (
        "likely reasons are dropout that does not follow eval(), batch statistics, random numbers, or a state that "
        "forward() changes"
    )
