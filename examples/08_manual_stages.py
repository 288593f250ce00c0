"""An encoder that torch.fx cannot trace: give its stages as a list of modules.

uv run python examples/08_manual_stages.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssl_exit import ExitClusterer, InputError


class Adaptive(nn.Module):
    """Control flow that depends on the images cannot be traced, but it can stand inside a stage."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return x - x.mean() if float(x.mean()) > 100 else x


torch.manual_seed(0)
images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
stages = [
    nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU()),
    Adaptive(16),
    nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
]

try:
    ExitClusterer(nn.Sequential(*stages)).fit(images)
except InputError as error:
    print(f"{error}\n")

clusterer = ExitClusterer(stages, exits=["stage0", "stage1"], n_clusters=10, max_disagreement=0.1)
clusterer.fit(images[:1300])
print([point.name for point in clusterer.exit_points_], clusterer.certificate_)
print("mean cost", clusterer.run(images[1300:]).cost.mean().round(3))
