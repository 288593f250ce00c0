"""Exits fitted beside a training: what is logged, and that the training does not notice."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ssl_exit import InputError, Preprocessing
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.registry import build_rules
from ssl_exit.fitting.count import collect
from ssl_exit.fitting.record import record
from ssl_exit.fitting.sample import Clustering
from ssl_exit.training import CentroidExits
from ssl_exit.training.callback import backbone_of, exit_metrics
from tests.conftest import batches_of, untrained


class Contrastive(pl.LightningModule):
    """SimCLR as lightly's examples write it, with dropout, on batches that are dicts of two views."""

    def __init__(self, name: str = "backbone") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, digits_encoder())
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(128, 32))
        self.criterion = NTXentLoss()

    def training_step(self, batch, batch_idx):
        encoder = self.get_submodule(self.name)
        return self.criterion(*(self.head(encoder(view)) for view in batch["views"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Views(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"views": [self.images[index] + 0.1 * torch.randn(1, 8, 8) for _ in range(2)], "index": index}


class RandomlyShifted(Dataset):
    """Images that draw from all global generators."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002
        return self.images[index] + 0.001 * noise


def trained(images, callbacks, module=None, **options):
    pl.seed_everything(0, verbose=False)
    module = module or Contrastive()
    loader = DataLoader(Views(images[:256]), batch_size=64, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options = quiet | {"enable_model_summary": False, "max_epochs": 3} | options
    trainer = pl.Trainer(callbacks=callbacks, **options)
    trainer.fit(module, loader)
    return module, trainer


pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|does not have many workers|log_every_n_steps).*")


def test_the_training_is_the_same_with_it_and_without(digits):
    class Modes(pl.Callback):
        """What a step finds after the callback."""

        def on_train_epoch_start(self, trainer, module):
            seen.append(([m.training for m in module.modules()], torch.get_rng_state()))

    seen = []
    exits = CentroidExits(RandomlyShifted(digits[:400]), n_clusters=5, every=1)
    plain, _ = trained(digits, [Modes()])
    watched, _ = trained(digits, [exits, Modes()])
    for (modes, state), (modes_too, state_too) in zip(seen[:3], seen[3:], strict=True):
        assert modes == modes_too
        assert torch.equal(state, state_too)
    assert len(exits.history) == 3
    for (name, value), too in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(value, too), name
    for one, too in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, too.grad)


def test_it_logs_after_every_few_epochs_and_the_last(digits):
    exits = CentroidExits(digits[:300], n_clusters=5, every=2)
    _, trainer = trained(digits, [exits])
    assert [row["epoch"] for row in exits.history] == [2, 3]
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    last = {name: value for name, value in exits.history[-1].items() if name != "epoch"}
    assert logged == pytest.approx(last)
    per_exit = [name for name in last if name.startswith("exits/agreement/")]
    assert set(last) - set(per_exit) == {"exits/cost_at_98", "exits/cost_at_95", "exits/agreement_at_half"}
    assert "exits/agreement/block2.relu" in per_exit
    assert 0 < last["exits/cost_at_95"] <= last["exits/cost_at_98"] < 1.1


def test_metrics_are_those_of_a_fit_to_the_same_images(rgb_digits):
    tapped = TappedEncoder.build(untrained("resnet20", rgb_digits), "auto", rgb_digits[:1])
    fit, measured = rgb_digits[:600], rgb_digits[800:]
    rules = build_rules("centroid", tapped.seen, 5)
    collected = collect(tapped, [batches_of(fit, 100)], 600, rules, Clustering(5, seed=3))
    recorded, _ = record(collected.fit(tapped, rules, AcrossExits(), 3), batches_of(measured, 100))
    metrics = exit_metrics(tapped, batches_of(rgb_digits, 100), 5, seed=3)
    for i, point in enumerate(tapped.staged.exit_points):
        agreement = (recorded.labels[:, i] == recorded.final).mean()
        assert metrics[f"exits/agreement/{point.name}"] == pytest.approx(agreement, abs=0.011)  # an image or two
    assert metrics["exits/agreement_at_half"] > 0.5


def test_a_resumed_training_keeps_the_history(digits, tmp_path):
    exits = CentroidExits(digits[:300], n_clusters=5, every=1)
    _, trainer = trained(digits, [exits], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = CentroidExits(digits[:300], n_clusters=5, every=1)
    other = CentroidExits(digits[:300], n_clusters=4, every=1)
    trainer = pl.Trainer(
        callbacks=[again, other], max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    loader = DataLoader(Views(digits[:256]), batch_size=64)
    trainer.fit(Contrastive(), loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.history[0] == exits.history[0]
    assert [row["epoch"] for row in again.history] == [1, 2]
    assert [row["epoch"] for row in other.history] == [2]


def test_the_images_drawn_depend_on_the_seed_alone(digits):
    drawn = [CentroidExits(digits, n_images=50, seed=seed).positions for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert set(drawn[0]) != set(drawn[2])


def test_uint8_images_take_a_preprocessing(digits):
    pixels = (digits[:200] * 255).to(torch.uint8)
    exits = CentroidExits(pixels, Preprocessing(8, (0.0,), (1.0,)), n_clusters=3)
    trained(digits, [exits], max_epochs=1)
    assert len(exits.history) == 1


def test_a_backbone_is_found_or_named(digits):
    module = Contrastive("trunk")
    with pytest.raises(InputError, match=r"none of backbone, .*it has \['trunk', 'head', 'criterion'\]"):
        trained(digits, [CentroidExits(digits[:100])], module)
    with pytest.raises(InputError, match="no submodule 'stem'"):
        backbone_of(module, "stem")
    exits = CentroidExits(digits[:100], n_clusters=3, backbone="trunk")
    trained(digits, [exits], module, max_epochs=1)
    assert len(exits.history) == 1
    for name in ("encoder", "encoder_q"):
        assert isinstance(backbone_of(Contrastive(name)), nn.Sequential)


def test_bad_parameters_are_refused_at_once(digits):
    with pytest.raises(InputError, match="every=0"):
        CentroidExits(digits, every=0)
    with pytest.raises(InputError, match="too few for 10 clusters"):
        CentroidExits(digits, n_images=12)


def test_a_backbone_that_diverged_is_warned_of(digits):
    module = Contrastive()
    nn.init.constant_(module.backbone.block1.conv.weight, float("nan"))
    exits = CentroidExits(digits[:100], n_clusters=3, every=1)
    with pytest.warns(UserWarning, match="too few images have finite features"):
        trained(digits, [exits], module, max_epochs=1)
    assert exits.history == []
