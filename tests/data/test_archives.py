"""Tar shards, Parquet files, mappings, iterables and transforms of the user's: the same images as from a folder."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from ssl_exit import ExitClusterer, InputError, Preprocessing, Runtime, Transform, load
from ssl_exit.data import archives, items
from ssl_exit.data.images import open_images
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.training.run import seeded

PREPARE = Preprocessing(8, (0.5,), (0.5,))


@pytest.fixture
def encoded(digits) -> dict[str, bytes]:
    """60 digits as PNG files by name, one of them broken."""
    files = {}
    for i in range(60):
        file = io.BytesIO()
        Image.fromarray((digits[i, 0].numpy() * 255).astype(np.uint8)).save(file, "PNG")
        files[f"{i:04d}.png"] = file.getvalue() if i != 7 else b"no image"
    return files


@pytest.fixture
def folder(encoded, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, content in encoded.items():
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def shards(encoded, tmp_path):
    """Three tar files, with what WebDataset puts beside images."""
    (tmp_path / "shards").mkdir()
    names = list(encoded)
    for s in range(3):
        with tarfile.open(tmp_path / "shards" / f"part-{s}.tar", "w") as tar:
            for name in names[20 * s : 20 * (s + 1)]:
                for each, content in ((name, encoded[name]), (name.replace("png", "cls"), b"3")):
                    entry = tarfile.TarInfo(each)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return tmp_path / "shards"


def batches_of(source, order, batch_size=16):
    return list(source.batches(np.asarray(order), batch_size))


def same(source, other) -> None:
    order = np.random.default_rng(0).permutation(60)
    assert len(source) == len(other) == 60
    for one, two in zip(batches_of(source, order), batches_of(other, order), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.indices, two.indices)
        assert one.skipped.keys() == two.skipped.keys()


def test_tar_shards(shards, folder):
    source = open_images(shards, PREPARE)
    same(source, open_images(folder, PREPARE))
    assert source.paths[20] == "part-1.tar/0020.png"
    one = open_images(shards / "part-1.tar", PREPARE, 2)
    assert torch.equal(batches_of(one, range(20), 20)[0].images, batches_of(source, range(20, 40), 20)[0].images)


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "paths"])
def test_parquet_files(kind, encoded, folder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "bytes": list(encoded.values()),
        "huggingface": [{"bytes": content, "path": name} for name, content in encoded.items()],
        "paths": [f"folder/{name}" for name in encoded],
    }[kind]
    (tmp_path / "tables").mkdir()
    where = tmp_path if kind == "paths" else tmp_path / "tables"
    for i in range(2):
        part = pa.table({"label": list(range(30)), "img": rows[30 * i : 30 * (i + 1)]})
        parquet.write_table(part, where / f"{i}.parquet", row_group_size=7)
    if kind == "paths":
        source = open_images(where / "0.parquet", PREPARE)
        expected = open_images(folder, PREPARE)
        for one, two in zip(batches_of(source, range(30)), batches_of(expected, range(30)), strict=True):
            assert torch.equal(one.images, two.images)
        return
    source = open_images(where, PREPARE)
    same(source, open_images(folder, PREPARE))
    assert source.paths[31] == ("1.parquet/1" if kind == "bytes" else "0031.png")
    assert pickle.loads(pickle.dumps(source)).paths == source.paths  # for processes that decode
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_images(where, PREPARE, key="absent")


def test_archives_that_are_none(tmp_path, encoded):
    (tmp_path / "a.tar").write_bytes(b"nothing")
    with pytest.raises(InputError, match="expected an uncompressed tar file"):
        open_images(tmp_path / "a.tar", PREPARE)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.txt"))
    with pytest.raises(InputError, match="holds no image files"):
        open_images(tmp_path / "b.tar", PREPARE)
    (tmp_path / "c.parquet").write_bytes(b"nothing")
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        open_images(tmp_path / "c.parquet", PREPARE)


def table(file, cells):
    """A Parquet file with a column of images."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"img": cells}), file)
    return open_images(file, PREPARE)


def reasons(source) -> dict[int, str]:
    """Why which images are unreadable."""
    return {i: reason for batch in batches_of(source, range(len(source))) for i, reason in batch.skipped.items()}


def test_cells_that_unpack_to_more_than_a_quarter_of_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "memory", lambda: 4 * 10**6)
    few = table(tmp_path / "few.parquet", [bytes(10_000)] * 50)
    assert len(few) == 50
    with pytest.raises(InputError, match="a quarter of the memory, or their images are"):
        table(tmp_path / "many.parquet", [bytes(10_000)] * 200)
    assert (tmp_path / "many.parquet").stat().st_size < 10**4
    with pytest.raises(InputError, match="a quarter of the memory, or their images are"):
        table(tmp_path / "nulls.parquet", [None] * 20_000)


@pytest.mark.parametrize(
    "cell",
    [None, 5, b"", "", [b"x"], {"bytes": [1, 2]}, {"bytes": "0.png"}, {"bytes": 5, "path": None}, {"other": b"x"}],
)
def test_cells_that_are_no_images_are_unreadable(cell, tmp_path, encoded):
    (tmp_path / "0.png").write_bytes(encoded["0000.png"])
    source = table(tmp_path / "a.parquet", [cell] * 2)
    assert reasons(source) == dict.fromkeys(range(2), "the cell holds neither the bytes nor the path of an image")
    assert list(source.dataset.versions()) == ["-1", "-1"]


def test_names_of_cells_that_are_no_text_are_not_shown(tmp_path, encoded):
    source = table(tmp_path / "a.parquet", [{"bytes": encoded["0000.png"], "path": 5}])
    assert not reasons(source)
    assert source.paths == ["a.parquet/0"]


def test_paths_that_are_no_text_are_unreadable(tmp_path):
    pa = pytest.importorskip("pyarrow")
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff.png"]).buffers())
    assert "UnicodeDecodeError" in reasons(table(tmp_path / "a.parquet", text))[0]


def test_fields_of_one_name_are_unreadable(tmp_path, encoded):
    pa = pytest.importorskip("pyarrow")
    fields = [pa.array([encoded["0000.png"]]), pa.array([[1, 2]])]
    assert reasons(table(tmp_path / "a.parquet", pa.StructArray.from_arrays(fields, ["bytes", "bytes"])))


def test_paths_that_leave_the_folder_of_the_parquet_file_are_unreadable(tmp_path, encoded):
    inside, outside = tmp_path / "data" / "in.png", tmp_path / "out.png"
    inside.parent.mkdir()
    for file in (inside, outside):
        file.write_bytes(encoded["0000.png"])
    (tmp_path / "data" / "link.png").symlink_to(outside)
    good = ["in.png", "./in.png", str(inside), "../data/in.png"]
    bad = ["../out.png", str(outside), "link.png", "../data2/in.png"]
    found = reasons(table(tmp_path / "data" / "a.parquet", [*good, *bad, "a\0b.png", "absent.png"]))
    assert list(found) == [4, 5, 6, 7, 8, 9]
    assert all(found[i].startswith("path outside the folder of the Parquet file: ") for i in range(4, 8))
    assert "null byte" in found[8]
    assert "no file" in found[9]
    mapped = [{"bytes": None, "path": path} for path in ("in.png", "../out.png")]
    assert list(reasons(table(tmp_path / "data" / "b.parquet", mapped))) == [1]


def tar_of(file, *entries) -> None:
    """A tar file of headers, changed and with the right checksum, each with its content."""
    with open(file, "wb") as out:
        for name, size, kind, content in entries:
            header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
            header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
            header[156:157] = kind
            if kind == tarfile.GNUTYPE_SPARSE:
                header[386:410] = tarfile.itn(0, 12, tarfile.GNU_FORMAT) + tarfile.itn(len(content), 12, 0)
                header[483:495] = tarfile.itn(10**13, 12, tarfile.GNU_FORMAT)
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            out.write(bytes(header) + content + bytes(-len(content) % 512))
        out.write(bytes(1024))


def test_tar_members_that_are_not_what_their_headers_say(tmp_path, encoded):
    png = encoded["0000.png"]
    good = ("good.png", len(png), tarfile.REGTYPE, png)
    sparse = ("sparse.png", len(png), tarfile.GNUTYPE_SPARSE, png)
    tar_of(tmp_path / "a.tar", sparse, good, ("huge.png", 10**13, tarfile.REGTYPE, png))
    source = open_images(tmp_path / "a.tar", PREPARE)
    assert source.paths == ["a.tar/sparse.png", "a.tar/good.png", "a.tar/huge.png"]
    assert reasons(source) == dict.fromkeys((0, 2), "sparse, or reaches beyond the end of its shard")


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (-512, tarfile.REGTYPE),
        (-512, tarfile.GNUTYPE_SPARSE),
        (2**62, tarfile.GNUTYPE_LONGNAME),
        (10**15, tarfile.XHDTYPE),
    ],
)
def test_tar_headers_that_lie_are_one_clear_error(tmp_path, encoded, size, kind):
    good = ("good.png", 8, tarfile.REGTYPE, b"no image")
    tar_of(tmp_path / "a.tar", good, ("bad.png", size, kind, b"x"), good)
    with pytest.raises(InputError, match="expected an uncompressed tar file"):
        open_images(tmp_path / "a.tar", PREPARE)


def test_hugging_face_datasets(encoded, folder):
    datasets = pytest.importorskip("datasets")
    good = {name: content for name, content in encoded.items() if content != b"no image"}
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"picture": [{"bytes": content, "path": None} for content in good.values()], "label": list(range(59))}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    expected = batches_of(open_images(folder, PREPARE), [i for i in range(60) if i != 7], 59)[0].images
    (batch,) = batches_of(open_images(dataset, PREPARE, key="picture"), range(59), 59)
    assert torch.equal(batch.images, expected)
    (streamed,) = batches_of(open_images(dataset.to_iterable_dataset(), PREPARE, key="picture"), range(59), 59)
    assert torch.equal(streamed.images, expected)
    with pytest.raises(InputError, match=r"must be under one of .* or the image_key; got \['label', 'picture'\]"):
        batches_of(open_images(dataset, PREPARE), range(2))
    with pytest.raises(InputError, match="pass one of them, such as a split"):
        open_images(datasets.DatasetDict({"train": dataset}), PREPARE)


class Endless(IterableDataset):
    def __init__(self, images, n):
        self.images, self.n = images, n

    def __iter__(self):
        return (self.images[i] for i in range(self.n))


@pytest.fixture(scope="module")
def fitted(digits):
    with seeded(0):
        encoder = digits_encoder().eval()
    how = {"runtime": Runtime(progress=False), "batch_size": 3, "max_disagreement": 0.2, "confidence": 0.5}
    return ExitClusterer(encoder, 3, **how).fit(digits[:600])


@pytest.mark.parametrize("kind", ["generator", "dataset", "loader"])
def test_iterables_are_fitted_in_memory_and_streamed_as_they_come(kind, fitted, digits, monkeypatch):
    def images(n):
        data = Endless(digits, n)
        return iter(data) if kind == "generator" else data if kind == "dataset" else DataLoader(data, 7)

    again = ExitClusterer(**fitted.get_params(deep=False)).fit(images(600))
    np.testing.assert_array_equal(again.predict(digits[600:700]), fitted.predict(digits[600:700]))
    monkeypatch.setattr("ssl_exit.clusterer.estimator.PART", 10)
    parts = list(fitted.stream(images(100), start=5))
    assert [len(part.labels) for part in parts] == [30, 30, 30, 5]
    np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), fitted.predict(digits[5:100]))
    monkeypatch.setattr(items, "memory", lambda: 40 * 64 * 4 * 4)
    with pytest.raises(InputError, match="more than 41 images does not fit into a quarter of the memory"):
        fitted.predict(images(100))


def test_a_transform_of_ones_own_is_known_by_its_name(fitted, digits, folder, tmp_path):
    def function(image):
        return torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))[None] / 127.5 - 1

    transform = Transform("grey to [-1, 1]", function)
    images = (digits * 255).to(torch.uint8)
    c = ExitClusterer(fitted.encoder, 3, runtime=Runtime(progress=False), preprocessing=transform).fit(images[:600])
    np.testing.assert_allclose(
        batches_of(open_images(folder, transform), range(16))[0].images,
        batches_of(open_images(folder, PREPARE), range(16))[0].images,
        atol=1e-6,
    )
    c.save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["preprocessing"] == {"transform": transform.name}
    with pytest.raises(InputError, match=r"pass it: transform=Transform\('grey to \[-1, 1\]', function\)"):
        load(tmp_path / "model", fitted.encoder)
    with pytest.raises(InputError, match="pass it"):
        load(tmp_path / "model", fitted.encoder, transform=Transform("other", function))
    again = load(tmp_path / "model", fitted.encoder, transform=transform)
    np.testing.assert_array_equal(again.predict(images[600:]), c.predict(images[600:]))
    assert not again.certificate_.void
    again.set_params(preprocessing=Transform("other", function))
    assert again.certificate_.void


@pytest.mark.parametrize("result", [3, torch.zeros(8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)])
def test_transforms_that_return_no_image_are_refused(result, digits):
    with pytest.raises(InputError, match="must return a floating-point tensor"):
        Transform("wrong", lambda image: result)(Image.new("L", (8, 8)))
