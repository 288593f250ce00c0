"""A vision model of Hugging Face's transformers: DINOv2, cut at its layers.

    uv run --with transformers python examples/05_transformers.py

AutoModel.from_pretrained("facebook/dinov2-small") gives one with weights; here it is small, and they are random.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from transformers import Dinov2Config, Dinov2Model

from ssl_exit import ExitClusterer, list_exits
from ssl_exit.report.tables import exit_table

digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
images = interpolate(digits[:1000], size=32, mode="bilinear").expand(-1, 3, -1, -1)

torch.manual_seed(0)
config = Dinov2Config(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=6, num_attention_heads=4)
encoder = Dinov2Model(config).eval()
print([point.name for point in list_exits(encoder, images[:1])])

c = ExitClusterer(encoder, n_clusters=10, max_disagreement=0.1).fit(images[:700])  # features are pooler_output
print(exit_table(c.evaluate(images[700:])))
