"""SimCLR as lightly's examples write it, with CentroidExits: what early exit would save, while the encoder learns.

uv run python examples/02_lightly.py
"""

import numpy as np
import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.multi_view_transform import MultiViewTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ssl_exit import ExitClusterer, Preprocessing
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.training import CentroidExits


class Digits(Dataset):
    """scikit-learn's digits as PIL images, (8, 8), or as views of them."""

    def __init__(self, transform=None) -> None:
        self.pixels, self.transform = (load_digits().images[:1024] * 15).astype(np.uint8), transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.pixels[index])
        return self.transform(image) if self.transform else image


class SimCLR(pl.LightningModule):
    """https://docs.lightly.ai/self-supervised-learning/examples/simclr.html, with a smaller backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = digits_encoder()
        self.projection_head = SimCLRProjectionHead(128, 128, 64)
        self.criterion = NTXentLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        first, second = batch
        return self.criterion(self(first), self(second))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


pl.seed_everything(0, verbose=False)
how = Preprocessing(8, mean=(0.0,), std=(1.0,))
view = transforms.Compose([transforms.RandomAffine(20, (0.12, 0.12), (0.8, 1.2)), transforms.ToTensor()])
views = DataLoader(Digits(MultiViewTransform([view, view])), batch_size=256, shuffle=True, drop_last=True)

model = SimCLR()
exits = CentroidExits(Digits(), how, n_clusters=10, every=2, n_images=1000)  # the training does not notice it
trainer = pl.Trainer(max_epochs=4, callbacks=[exits], accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, views)
for row in exits.history:  # a logger has the same curves
    print(f"epoch {row['epoch']}: cost {row['exits/cost_at_95']:.3f} at 95 % agreement")

c = ExitClusterer(model.backbone, n_clusters=10, max_disagreement=0.05, preprocessing=how).fit(Digits())
print(c.certificate_)
