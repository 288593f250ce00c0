"""A checkpoint of solo-learn: the backbone is found in it, and what lies beside it is left out.

uv run python examples/03_solo_learn.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torchvision.models import resnet18

from ssl_exit import EncoderSpec, ExitClusterer, load

digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
images = interpolate(digits[:700], size=32, mode="bilinear").expand(-1, 3, -1, -1)

# As solo-learn writes one: the backbone beside the projector and the online classifier, under "state_dict".
torch.manual_seed(0)
state = {f"backbone.{name}": value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")}
state |= {"classifier.weight": torch.zeros(10, 512), "projector.0.weight": torch.zeros(128, 512)}

with tempfile.TemporaryDirectory() as folder:
    checkpoint = f"{folder}/simclr.ckpt"
    torch.save({"state_dict": state, "epoch": 100}, checkpoint)

    spec = EncoderSpec("resnet18", checkpoint)  # "resnet18_sololearn" for CIFAR, where solo-learn changes the stem
    c = ExitClusterer(spec, n_clusters=10, max_disagreement=0.1).fit(images[:500])
    result = c.run(images[500:])
    print(f"mean cost {result.cost.mean():.3f}; {c.certificate_}")

    c.save(f"{folder}/model")  # a model that was made from a spec builds its encoder itself
    assert (load(f"{folder}/model").predict(images[500:]) == result.labels).all()
