"""Every kind of data gives the same images, and bad ones are told apart from good."""

import os
import signal
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from ssl_exit import Preprocessing
from ssl_exit.data.image_files import FolderImages
from ssl_exit.data.images import open_images
from ssl_exit.data.reading import read
from ssl_exit.errors import InputError

GREY = Preprocessing(8, (0.0,), (1.0,))
RGB = Preprocessing(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def everything(source, batch_size=7, order=None):
    order = np.arange(len(source)) if order is None else order
    batches = list(source.batches(order, batch_size))
    skipped = {k: v for batch in batches for k, v in batch.skipped.items()}
    images = [b.images for b in batches if len(b.indices)]
    return torch.cat([b.indices for b in batches]), torch.cat(images), skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_tensor_dataset_and_loader_agree(image_folder, workers):
    folder = FolderImages(image_folder, GREY)
    tensor = torch.stack([folder[i] for i in range(len(folder))])
    assert len(tensor) == 60
    assert tensor.shape[1:] == (1, 8, 8)
    labelled = TensorDataset(tensor, torch.arange(60))
    pictures = [Image.open(image_folder / path).copy() for path in folder.paths]
    order = np.random.default_rng(0).permutation(60)
    for data, preprocessing in (
        (str(image_folder), GREY),
        (image_folder, GREY),
        (tensor, None),
        (labelled, None),
        (pictures, GREY),
        ((tensor * 255).round().to(torch.uint8), GREY),
        (DataLoader(labelled, batch_size=3, shuffle=True), None),
        (DataLoader(labelled, batch_size=None), None),
        (Subset(folder, range(60)), GREY),
        ([str(image_folder / path) for path in folder.paths], GREY),
        ([image_folder / path for path in folder.paths], GREY),
        (tensor.numpy(), None),
        (tensor.permute(0, 2, 3, 1).contiguous().numpy(), None),
        (np.broadcast_to(tensor.permute(0, 2, 3, 1).numpy(), (60, 8, 8, 1)), None),  # read-only, as mapped files are
        ([np.asarray(picture) for picture in pictures], GREY),
        ([np.asarray(picture)[..., None] for picture in pictures], GREY),
        ([((image, image + 1), 3, "name") for image in tensor], None),
        ([{"label": 1, "image": picture} for picture in pictures], GREY),
        (DataLoader([{"pixel_values": image, "label": 1} for image in tensor], batch_size=4), None),
        (DataLoader([([image, image + 1], 1) for image in tensor], batch_size=4), None),
    ):
        indices, images, skipped = everything(open_images(data, preprocessing, workers), order=order)
        assert indices.tolist() == order.tolist()
        torch.testing.assert_close(images, tensor[order])
        assert not skipped


def test_folder_order_classes_and_targets(image_folder):
    folder = FolderImages(image_folder, GREY)
    assert folder.paths == sorted(folder.paths)
    assert folder.classes == [str(i) for i in range(10)]
    assert folder.targets.tolist() == [i // 6 for i in range(60)]
    Image.new("L", (8, 8)).save(image_folder / "loose.png")
    assert FolderImages(image_folder, GREY).targets is None


def test_unreadable_images_are_skipped_with_a_reason(image_folder):
    good = FolderImages(image_folder, GREY)
    whole = (image_folder / good.paths[5]).read_bytes()
    (image_folder / "0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "3" / "text.jpg").write_text("no image")
    (image_folder / "4" / "empty.png").touch()
    (image_folder / "notes.txt").write_text("not counted")
    source = open_images(image_folder, GREY)
    indices, images, skipped = everything(source, batch_size=2)
    assert len(source) == 63
    assert len(images) == len(indices) == 60
    bad = {source.paths[i] for i in skipped}
    assert bad == {"0/cut.png", "3/text.jpg", "4/empty.png"}
    assert all(reason for reason in skipped.values())


def test_mixed_sizes_and_modes(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    rgb = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "dark.png")  # 16 bits, all of them low
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(rgb).save(tmp_path / "rgb.jpg")
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(grey > 128).save(tmp_path / "binary.png")
    source = open_images(tmp_path, RGB)
    indices, images, skipped = everything(source)
    assert images.shape == (8, 3, 8, 8)
    assert [source.paths[i] for i in skipped] == ["float.tif"]
    assert "no known range" in next(iter(skipped.values()))
    by_name = dict(zip([source.paths[i] for i in indices], images, strict=True))
    torch.testing.assert_close(by_name["deep.png"], by_name["grey.png"], atol=1 / 255, rtol=0)
    assert by_name["dark.png"].max() <= 1 / 255


FOUR = TensorDataset(torch.zeros(4, 1))


class Opened(Dataset):
    """Images that only a worker which was prepared for them can give."""

    ready = False

    def __len__(self):
        return 4

    def __getitem__(self, index):
        assert self.ready
        return torch.full((1, 8, 8), float(index))


def prepare(worker):
    get_worker_info().dataset.dataset.ready = True


def test_workers_start_as_the_loader_has_it():
    loader = DataLoader(Opened(), num_workers=1, worker_init_fn=prepare, multiprocessing_context="fork")
    assert everything(open_images(loader))[1][:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_only_formats_on_the_list_are_decoded(image_folder, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(image_folder / "0" / "drawing.jpg")  # Pillow would start Ghostscript
    Image.open(image_folder / "0" / FolderImages(image_folder / "0", GREY).paths[0]).save(tmp_path / "x.gif")
    (tmp_path / "x.gif").rename(image_folder / "0" / "really_a_gif.png")
    source = open_images(image_folder, GREY)
    _, _, skipped = everything(source)
    assert [source.paths[i] for i in skipped] == ["0/drawing.jpg"]
    assert "UnidentifiedImageError" in next(iter(skipped.values()))


def test_memory_is_bounded_by_the_pixels_of_a_file(tmp_path):
    Image.new("L", (1_000_000, 1), 7).save(tmp_path / "line.png")
    Image.new("L", (1, 300_000), 9).save(tmp_path / "column.png")
    Image.fromarray(np.full((3000, 3000), 257 * 11, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (100, 50), 3).save(tmp_path / "small.png")
    source = open_images(tmp_path, Preprocessing(32, (0.0,), (1.0,)))
    tracemalloc.start()
    indices, images, skipped = everything(source, batch_size=1)
    peak = tracemalloc.get_traced_memory()[1]  # of NumPy; 16-bit pixels in float64 would take 8 bytes each
    assert peak < 5 * 3000 * 3000
    tracemalloc.stop()
    assert not skipped
    values = {source.paths[i]: x.mul(255).round().unique().tolist() for i, x in zip(indices, images, strict=True)}
    assert values == {"line.png": [7], "column.png": [9], "deep.png": [11], "small.png": [3]}
    limited = open_images(tmp_path, Preprocessing(32, (0.0,), (1.0,)), max_pixels=500_000)
    assert {source.paths[i] for i in everything(limited)[2]} == {"line.png", "deep.png"}


def test_large_images_averaged_down_first_hardly_differ(tmp_path):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (800, 600), Image.Resampling.BICUBIC
    )
    prepare = Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    slow = prepare(torch.from_numpy(np.array(smooth)).permute(2, 0, 1))
    smooth.save(tmp_path / "a.png")
    smooth.save(tmp_path / "a.jpg", quality=95)
    for index in range(2):
        assert (FolderImages(tmp_path, prepare)[index] - slow).abs().mean() < 0.01


def test_folders_end(image_folder, tmp_path, monkeypatch):
    expected = FolderImages(image_folder, GREY).paths
    (image_folder / "0" / "self").symlink_to(image_folder)
    (image_folder / "again").symlink_to(image_folder / "1", target_is_directory=True)
    (image_folder / "circle.png").symlink_to(image_folder / "circle.png")
    (image_folder / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(image_folder / "pipe.png")
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("L", (8, 8)).save(outside / "new.png")
    (image_folder / "more").symlink_to(outside)
    assert FolderImages(image_folder, GREY).paths == sorted([*expected, "more/new.png"])
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("/3"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refused)
    with pytest.warns(UserWarning, match=r"1 folders cannot be read, such as .*/3' \(Permission denied\)"):
        assert len(FolderImages(image_folder, GREY)) == len(expected) + 1 - 6


class Short(Dataset):
    """Ends before its length says so."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index >= 25:
            raise self.error
        return torch.full((1, 8, 8), index / 40)


def test_data_that_end_early_are_refused():
    batches = read(open_images(Short(StopIteration())), np.arange(40), 5)
    with pytest.raises(InputError, match="25 images came where the data promised 40"):
        list(batches)


def test_images_that_look_like_pixels_are_warned_of():
    for images, expected in (
        (torch.rand(4, 1, 8, 8) * 255, 1),
        (torch.randn(4, 1, 8, 8) * 3, 0),
        (torch.ones(4, 1, 8, 8), 0),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            list(read(open_images(images), np.arange(4), 2))
        assert len(seen) == expected
        assert all("taken as they are" in str(each.message) for each in seen)


class Dying(Opened):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_of_the_system():
    with pytest.raises(OSError, match=r"a process that decodes images died.*/dev/shm"):
        everything(open_images(Dying(), None, 1))


@pytest.mark.parametrize(
    ("data", "preprocessing", "message"),
    [
        (torch.zeros(0, 3, 8, 8), None, "no images"),
        (torch.zeros(3, 8, 8), None, "four dimensions"),
        (torch.zeros(3, 3, 8, 8, dtype=torch.uint8), None, "need a preprocessing"),
        (torch.zeros(3, 3, 8, 8, dtype=torch.int32), None, "floating point or uint8"),
        (np.zeros((3, 8, 8)), None, r"images\[:, None\]"),
        (np.array(["a"]), None, "floating point or uint8"),
        (np.zeros((3, 3, 8, 8), dtype=np.uint8), None, "need a preprocessing"),
        ({"image": torch.zeros(3, 3, 8, 8)}, None, r"a mapping of \['image'\]"),
        (["a.jpg", "b.jpg"], None, "need a preprocessing"),
        (5, None, "got int"),
        ("no/such/folder", RGB, "is not a folder"),
        (DataLoader(FOUR, sampler=WeightedRandomSampler([1.0] * 4, 4)), None, "Subset"),
        (
            DataLoader(FOUR, sampler=RandomSampler(FOUR, num_samples=2)),
            None,
            "a loader with a RandomSampler that chooses",
        ),
        (DataLoader(FOUR, sampler=RandomSampler(FOUR, replacement=True)), None, "Subset"),
        (DataLoader(FOUR, batch_sampler=[[0, 1]]), None, "a loader with a list that chooses"),
    ],
)
def test_wrong_data_is_refused(data, preprocessing, message):
    with pytest.raises(InputError, match=message):
        open_images(data, preprocessing)


def test_empty_folder_and_missing_preprocessing(tmp_path):
    with pytest.raises(InputError, match="holds no image files"):
        open_images(tmp_path, RGB)
    with pytest.raises(InputError, match="need a preprocessing"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], "differ in shape"),
        ([torch.zeros(3), torch.zeros(3)], r"must be a tensor, \(N, C, H, W\)"),
        ([{"picture": torch.zeros(1, 8, 8)}], "must be under one of .*; got .'picture'"),
        ([3, 4], "tensors, arrays or PIL images.*; got 3"),
        ([np.array(["a"])], "floating point or uint8"),
        ([Image.new("L", (8, 8))], "need a preprocessing"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(items, message):
    source = open_images(items)
    with pytest.raises(InputError, match=message):
        everything(source)
