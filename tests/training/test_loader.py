"""Training images: from folders and tensors, in memory or not, and the order in which they come."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_exit.data import pixels as module
from ssl_exit.data.images import FolderImages
from ssl_exit.training.loader import EpochOrder, PixelsInMemory, PixelsOnDisk, digits_pixels, open_pixels
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.errors import InputError

SMALL = Preprocessing(8, (0.0,), (1.0,))


def test_a_folder_in_memory_and_on_disk_are_the_same(image_folder, monkeypatch):
    memory = open_pixels(image_folder, SMALL, num_workers=2)
    monkeypatch.setattr(module, "MEMORY_SHARE", 0)
    disk = open_pixels(image_folder, SMALL)
    assert isinstance(memory, PixelsInMemory)
    assert isinstance(disk, PixelsOnDisk)
    assert len(memory) == len(disk) == 60
    rows = [5, 59, 0]
    for one, two in zip(memory[rows], disk[rows], strict=True):
        assert torch.equal(one, two)
    assert memory[rows][1].dtype == torch.uint8
    assert memory.targets.tolist() == disk.targets.tolist() == [i // 6 for i in range(60)]


def test_unreadable_images_are_left_out_or_replaced(image_folder, monkeypatch):
    bad = sorted(image_folder.glob("0/*.png"))[1]
    bad.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=rf"1 of 60 images cannot be read, such as 0/{bad.name}"):
        memory = open_pixels(image_folder, SMALL)
    assert len(memory) == 59
    assert memory.targets.tolist() == [0] * 5 + [i // 6 for i in range(6, 60)]
    monkeypatch.setattr(module, "MEMORY_SHARE", 0)
    disk = open_pixels(image_folder, SMALL)
    with pytest.warns(UserWarning, match=rf"0/{bad.name} cannot be read; others stand in"):
        positions, images = disk[[0, 1, 2]]
    assert positions.tolist() == [0, 0, 2]  # in its place: the others keep theirs
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[2], memory[[1]][1][0])
    with pytest.warns(UserWarning, match="others stand in"):  # where the batch has none, the folder's first
        positions, images = open_pixels(image_folder, SMALL)[[1]]
    assert positions.tolist() == [0]
    assert torch.equal(images, memory[[0]][1])
    disk.stand_ins = np.array([1, 5])  # or the first of those that may
    assert disk[[1]][0].tolist() == [5]


@pytest.mark.parametrize("share", [0, 0.25])
def test_batches_come_in_order(image_folder, monkeypatch, share):
    monkeypatch.setattr(module, "MEMORY_SHARE", share)
    pixels = open_pixels(image_folder, SMALL, num_workers=2)
    order = np.array([7, 3, 59, 0, 21])
    batches = list(pixels.batches(order, 2))
    assert [len(b) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), pixels[order][1])


def test_processes_that_hold_the_same_images_share_the_memory(image_folder, monkeypatch):
    monkeypatch.setattr(module, "memory", lambda: 4 * 60 * 64)  # bytes: a quarter holds the folder once
    assert isinstance(open_pixels(image_folder, SMALL), PixelsInMemory)
    assert isinstance(open_pixels(image_folder, SMALL, processes=2), PixelsOnDisk)


def test_a_folder_of_unreadable_images_is_an_error(image_folder):
    for file in image_folder.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 60 images"):
        open_pixels(image_folder, SMALL)
    with pytest.raises(InputError, match="none of the 60 images"):
        PixelsOnDisk(FolderImages(image_folder, SMALL))[[0, 1]]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"must be a tensor, \(N, C, H, W\)"),
        (torch.zeros(0, 1, 8, 8), "must be a tensor"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "uint8 or float"),
        (torch.full((2, 1, 8, 8), -1.0), r"must lie in \[0, 1\]"),
        (torch.full((2, 1, 8, 8), torch.nan), r"must lie in \[0, 1\]"),
    ],
)
def test_tensors_that_cannot_be_trained_on(images, message):
    with pytest.raises(InputError, match=message):
        PixelsInMemory(images)


def test_digits_have_classes():
    digits = digits_pixels()
    assert digits[[3]][1].shape == (1, 1, 8, 8)
    assert digits.targets[3] == 3


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 4), st.integers(0, 5))
def test_processes_share_each_batch_and_an_epoch_sees_each_image_once(n, per_process, world, epoch):
    positions = np.arange(1000, 1000 + n)
    size = per_process * world
    shares = [EpochOrder(positions, size, 7, rank, world) for rank in range(world)]
    for share in shares:
        share.set_epoch(epoch)
    seen = [i for batches in zip(*shares, strict=True) for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == n // size * size
    assert set(seen) <= set(positions.tolist())
    assert all(len(batch) == per_process for share in shares for batch in share)
    alone = EpochOrder(positions, size, 7)
    alone.set_epoch(epoch)
    assert [sorted(b) for b in alone] == [sorted(i for share in b for i in share) for b in zip(*shares, strict=True)]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        order = EpochOrder(np.arange(100), 10, seed)
        order.set_epoch(epoch)
        orders.append(list(order))
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
