"""A network of timm, by name. weights="DEFAULT" downloads timm's; here they are random.

uv run --with timm python examples/04_timm.py
"""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from ssl_exit import EncoderSpec, ExitClusterer
from ssl_exit.report.tables import exit_table

digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
images = interpolate(digits[:700], size=32, mode="bilinear").expand(-1, 3, -1, -1)

torch.manual_seed(0)
spec = EncoderSpec("timm:resnet18")  # weights: None, "DEFAULT" or a file; spec.preprocessing() is that of the weights
c = ExitClusterer(spec, n_clusters=10, max_disagreement=0.1, preprocessing=spec.preprocessing())
c.fit(images[:500])
print([(point.name, round(point.cost, 2)) for point in c.exit_points_])
print(exit_table(c.evaluate(images[500:])))
