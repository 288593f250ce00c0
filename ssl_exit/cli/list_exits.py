"""ssl-exit list-exits"""

from typing import Any


def list_exits(encoder: str, size: int = 224, channels: int = 3, encoder_options: dict[str, Any] | None = None) -> None:
    """List the exit points of an encoder: name, shape of the tensor there, cost so far.

    Args:
        encoder: a torchvision architecture, timm:NAME, transformers:FOLDER, resnet20_cifar, resnet56_cifar, or
            module:function.
        size: height and width in pixels of what the encoder sees.
        channels: 3 for RGB, 1 for grey images.
        encoder_options: arguments of the architecture, such as --encoder-options.img_size 224.
    """
    import torch

    from ssl_exit.encoders import graph
    from ssl_exit.encoders.build import EncoderSpec
    from ssl_exit.report.tables import exit_points_table

    points = graph.list_exits(
        EncoderSpec(encoder, options=encoder_options).build(), torch.zeros(1, channels, size, size)
    )
    print(exit_points_table(points))
