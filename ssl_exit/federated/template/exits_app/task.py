"""What is fitted, and to which images: the part to edit."""

from pathlib import Path
from typing import Any

import torch
from flwr.app import Context

from ssl_exit import EncoderSpec, ExitClusterer, Preprocessing, Runtime
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.federated import dirichlet_split


def clusterer(config: Any) -> ExitClusterer:
    """The parameters, the same at the server and at all clients."""
    mean, std = (tuple(float(value) for value in str(config[name]).split()) for name in ("mean", "std"))
    encoder: Any
    if config["encoder"] == "digits_cnn" and not config["weights"]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = digits_encoder()
    else:
        encoder = EncoderSpec(config["encoder"], config["weights"] or None)
    return ExitClusterer(
        encoder,
        n_clusters=config["n-clusters"],
        max_disagreement=config["max-disagreement"],
        confidence=config["confidence"],
        preprocessing=Preprocessing(config["size"], mean, std),
        runtime=Runtime(progress=False),
    )


def images(context: Context) -> Any:
    """The images of this client."""
    data = context.node_config.get("data", context.run_config["data"])
    if data != "digits":
        return Path(str(data)).expanduser()
    from ssl_exit.training.loader import digits_images

    digits = digits_images()
    assert digits.targets is not None
    n, i = int(context.node_config["num-partitions"]), int(context.node_config["partition-id"])
    return digits.images[dirichlet_split(digits.targets, n, float(context.run_config["alpha"]))[i]]
