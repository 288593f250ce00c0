"""Training images: from folders and tensors, in memory or not, and the order in which they come."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_exit.data.images import DatasetImages, TensorImages
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.errors import InputError
from ssl_exit.training import loader as module
from ssl_exit.training.loader import EpochLoader, FullBatches, digits_images, open_training_images

SMALL = Preprocessing(8, (0.0,), (1.0,))


def read(source, positions, batch_size=100):
    """Positions and pixels of full batches, joined."""
    batches = list(FullBatches(source)(np.array(positions), batch_size))
    return torch.cat([batch.indices for batch in batches]), torch.cat([batch.images for batch in batches])


def test_a_folder_in_memory_and_on_disk_are_the_same(image_folder, monkeypatch):
    memory = open_training_images(image_folder, SMALL, num_workers=2)
    monkeypatch.setattr(module, "MEMORY_SHARE", 0)
    disk = open_training_images(image_folder, SMALL)
    assert isinstance(memory, TensorImages)
    assert isinstance(disk, DatasetImages)
    assert len(memory) == len(disk) == 60
    rows = [5, 59, 0]
    for one, two in zip(read(memory, rows), read(disk, rows), strict=True):
        assert torch.equal(one, two)
    assert read(memory, rows)[1].dtype == torch.uint8
    assert memory.targets.tolist() == disk.targets.tolist() == [i // 6 for i in range(60)]


def test_unreadable_images_are_left_out_or_replaced(image_folder, monkeypatch):
    bad = sorted(image_folder.glob("0/*.png"))[1]
    bad.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=rf"1 of 60 images cannot be read, such as 0/{bad.name}"):
        memory = open_training_images(image_folder, SMALL)
    assert len(memory) == 59
    assert memory.targets.tolist() == [0] * 5 + [i // 6 for i in range(6, 60)]
    monkeypatch.setattr(module, "MEMORY_SHARE", 0)
    disk = open_training_images(image_folder, SMALL)
    with pytest.warns(UserWarning, match=rf"0/{bad.name} .* cannot be read; others replace such images") as told:
        positions, images = read(disk, [0, 1, 2, 1, 3], batch_size=3)
    assert len(told) == 1
    assert positions.tolist() == [0, 2, 0, 3, 3]  # batches stay full
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], read(memory, [1])[1][0])
    with pytest.warns(UserWarning, match="others replace"):  # a batch without a readable image is the one before
        positions, _ = read(disk, [4, 1], batch_size=1)
    assert positions.tolist() == [4, 4]


@pytest.mark.parametrize("share", [0, 0.25])
def test_batches_come_in_order(image_folder, monkeypatch, share):
    monkeypatch.setattr(module, "MEMORY_SHARE", share)
    source = open_training_images(image_folder, SMALL, num_workers=2)
    order = np.array([7, 3, 59, 0, 21])
    batches = list(FullBatches(source)(order, 2))
    assert [batch.indices.tolist() for batch in batches] == [[7, 3], [59, 0], [21]]
    assert torch.equal(torch.cat([batch.images for batch in batches]), read(source, order)[1])


def test_processes_that_hold_the_same_images_share_the_memory(image_folder, monkeypatch):
    monkeypatch.setattr(module, "memory", lambda: 4 * 60 * 64)  # bytes: a quarter holds the folder once
    assert isinstance(open_training_images(image_folder, SMALL), TensorImages)
    assert isinstance(open_training_images(image_folder, SMALL, processes=2), DatasetImages)


def test_a_folder_of_unreadable_images_is_an_error(image_folder, monkeypatch):
    for file in image_folder.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 60 images"):
        open_training_images(image_folder, SMALL)
    monkeypatch.setattr(module, "MEMORY_SHARE", 0)
    with pytest.raises(InputError, match="none of the 60 images"), pytest.warns(UserWarning, match="others replace"):
        read(open_training_images(image_folder, SMALL), [0, 1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"has four dimensions, \(N, C, H, W\)"),
        (torch.zeros(0, 1, 8, 8), "there are no images"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "floating point or uint8"),
        (torch.full((2, 1, 8, 8), -1.0), r"must lie in \[0, 1\]"),
        (torch.full((2, 1, 8, 8), torch.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_tensors_that_cannot_be_trained_on(images, message):
    with pytest.raises(InputError, match=message):
        open_training_images(images, SMALL)


def test_digits_have_classes():
    digits = digits_images()
    assert read(digits, [3])[1].shape == (1, 1, 8, 8)
    assert digits.targets[3] == 3


def epoch_of(n, size, seed, epoch, rank=0, world=1):
    """Positions of the batches of one process in one epoch."""
    images = torch.arange(1000 + n, dtype=torch.float32).view(-1, 1, 1, 1)
    source, positions = TensorImages(images, pixels=True), np.arange(1000, 1000 + n)
    loader = EpochLoader(source, positions, size, seed, rank, world)
    loader.epoch = epoch
    batches = [indices.tolist() for indices, pixels in loader if torch.equal(pixels.flatten().long(), indices)]
    assert len(batches) == len(loader)
    return batches


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 4), st.integers(0, 5))
def test_processes_share_each_batch_and_an_epoch_sees_each_image_once(n, per_process, world, epoch):
    size = per_process * world
    shares = [epoch_of(n, size, 7, epoch, rank, world) for rank in range(world)]
    seen = [i for batches in zip(*shares, strict=True) for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == n // size * size
    assert all(1000 <= i < 1000 + n for i in seen)
    assert all(len(batch) == per_process for share in shares for batch in share)
    alone = epoch_of(n, size, 7, epoch)
    assert [sorted(b) for b in alone] == [sorted(i for share in b for i in share) for b in zip(*shares, strict=True)]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_of(100, 10, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
