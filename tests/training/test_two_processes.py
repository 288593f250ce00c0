"""Two processes that share every batch train what one process does with all of it."""

import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from ssl_exit.data.images import TensorImages
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.front import FrontDescriptor
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.settings import Front, Optimization
from ssl_exit.training import front
from ssl_exit.training.methods import build_training
from ssl_exit.training.run import train

# Batch statistics and random views are each process's own: without them both must come to the same weights.
devices, out = int(sys.argv[1]), sys.argv[2]
images = torch.tensor(load_digits().images[:512], dtype=torch.float32)[:, None] / 16
front.shifted = lambda images, shift, mirror=None: images


def network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


def trained(method, **options):
    torch.manual_seed(0)
    encoder = network()
    tapped = TappedEncoder.build(encoder, ["3"], images[:1], descriptor="average")
    rate = 0.01 if method == "distill" else 0.2  # its loss is steep: rounding must not grow
    how = Optimization("sgd", rate, momentum=0.9, weight_decay=1e-4, schedule="one_cycle")
    module = build_training(
        method, tapped, Preprocessing(8, (0.0,), (1.0,)), views="drawing", optimization=how, options=options
    )
    module.views = lambda pixels: pixels + 0
    dims = [tapped.output.dim, *(d.dim for d in tapped.descriptors)]
    if method == "distill":
        module.heads = nn.ModuleList([nn.Linear(dim, module.n_clusters) for dim in tapped.seen])
    else:
        module.heads = nn.ModuleList([nn.Linear(dim, module.projection) for dim in dims])
    if method == "moco":
        from ssl_exit.training.module import frozen_copy

        module.key_heads = frozen_copy(module.heads)
    train(module, images, epochs=2, batch_size=64, devices=devices, device="cpu", precision="32-true", progress=False,
          monitor_share=0.0, logger="none")
    return {f"{method}.{name}": value for name, value in encoder.state_dict().items()}


def taught():
    torch.manual_seed(0)
    how = Front("module", epochs=2, patience=0, mirror=False, network=network(), devices=devices)
    descriptor = FrontDescriptor(how.network, (1, 8, 8), 64)
    soft = torch.rand(512, 5, generator=torch.Generator().manual_seed(0)).mul(5).softmax(1)
    result = front.teach(descriptor, [], TensorImages(images), np.arange(512), soft, soft.argmax(1), how,
                         max_disagreement=0.1, device="cpu")
    assert result.epochs == 2
    return {f"front.{name}": value for name, value in result.front.state_dict().items()}


front.train = lambda *args, **options: train(*args, **options | {"precision": "32-true"})
weights = trained("simclr", exit_weight=0.5) | trained("moco", bank=256, exit_weight=0.5)
weights |= trained("distill", n_clusters=5, neighbours=1, rounds=1) | taught()
torch.manual_seed(0)
weights |= {f"untrained.{name}": value for name, value in network().state_dict().items()}
if devices == 1 or torch.distributed.get_rank() == 0:
    torch.save(weights, out)
"""


@pytest.mark.slow
def test_two_processes_come_to_the_weights_of_one(tmp_path):
    """SimCLR and MoCo with negatives gathered, self-distillation and a front, at the same batch."""
    (script := tmp_path / "both.py").write_text(SCRIPT)
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    subprocess.run([sys.executable, script, "1", one], check=True, timeout=300)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*start, script, "2", two], check=True, timeout=300)
    alone, shared = torch.load(one), torch.load(two)
    assert alone.keys() == shared.keys()
    assert {name.partition(".")[0] for name in alone} == {"simclr", "moco", "distill", "front", "untrained"}
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-5, msg=name)
        if name.endswith("0.weight") and not name.startswith("untrained"):
            assert (value - alone["untrained.0.weight"]).abs().max() > 1e-3
