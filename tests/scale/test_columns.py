"""A model applied to columns answers as `predict` does."""

import io
import pickle

import cloudpickle
import numpy as np
import pytest
import torch
from PIL import Image

from ssl_exit import InputError, Preprocessing, load
from ssl_exit.cli import main
from ssl_exit.data.image_files import FolderImages
from ssl_exit.scale import LabelColumns, label_dataset
from tests.conftest import clusterer, untrained

N = 200


@pytest.fixture(scope="module")
def pixels(rgb_digits) -> np.ndarray:
    """(1000, 32, 32, 3) uint8"""
    scaled = (rgb_digits - rgb_digits.min()) / (rgb_digits.max() - rgb_digits.min())
    return (scaled * 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def fitted(rgb_digits, pixels):
    options = {"n_clusters": 5, "max_disagreement": 0.2, "confidence": 0.5, "batch_size": 64}
    c = clusterer(untrained("resnet20", rgb_digits), Preprocessing(32), **options)
    return c.fit(torch.from_numpy(pixels[:800]).permute(0, 3, 1, 2))


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def expected(fitted, pixels):
    return fitted.run(torch.from_numpy(pixels[:N]).permute(0, 3, 1, 2))


def test_cells_of_every_kind_have_the_labels_of_predict(fitted, pixels, tmp_path):
    c = fitted
    result = expected(c, pixels)
    (tmp_path / "one.png").write_bytes(encoded(pixels[2]))
    cells = [encoded(image) for image in pixels[:N]]
    cells[1], cells[2], cells[3] = {"bytes": cells[1], "path": None}, str(tmp_path / "one.png"), pixels[3]
    cells[4], cells[5], cells[6] = None, b"no image", pixels[6].astype(float)
    rows = LabelColumns(c.model_, batch_size=16)({"id": np.arange(N), "image": cells})
    assert list(rows) == ["id", "label", "exit", "score", "reason"]
    good = ~np.isin(np.arange(N), [4, 5, 6])
    np.testing.assert_array_equal(rows["label"][good], result.labels[good])
    np.testing.assert_array_equal(rows["exit"][good], np.array(c.exit_names_)[result.exits[good]])
    np.testing.assert_allclose(rows["score"][good], result.scores[good], atol=1e-5)
    assert (rows["label"][~good] == -1).all()
    assert (rows["reason"] != "").tolist() == (~good).tolist()
    assert "no image: expected bytes, a path or uint8 pixels" in rows["reason"][4]


def test_an_arrow_table_and_no_rows(fitted, pixels):
    pyarrow = pytest.importorskip("pyarrow")
    c = fitted
    cells = [encoded(image) for image in pixels[:20]]
    table = pyarrow.table({"id": range(20), "image": cells, "note": ["x"] * 20})
    label = LabelColumns(c.model_, id_column="id")
    rows = label(table)
    assert rows.column_names == ["id", "label", "exit", "score", "reason"]
    assert rows["label"].to_pylist() == expected(c, pixels).labels[:20].tolist()
    assert rows.schema == label(table.slice(0, 0)).schema
    assert len(label({"id": [], "image": []})["label"]) == 0


def test_one_object_serves_every_worker(fitted, pixels, tmp_path):
    """It is pickled before and after its first call, and loads the model where it is."""
    c = fitted
    c.save(tmp_path / "model")
    label = LabelColumns(tmp_path / "model", encoder=c.encoder, device="cpu")
    columns = {"image": list(pixels[:20])}
    first = label(columns)["label"]
    for copied in (pickle.loads(pickle.dumps(label)), cloudpickle.loads(cloudpickle.dumps(label))):
        assert "model" not in vars(copied)
        np.testing.assert_array_equal(copied(columns)["label"], first)


def test_columns_that_are_missing_or_in_the_way(fitted):
    c = fitted
    with pytest.raises(InputError, match=r"there is no column \['image'\]; there are \['photo'\]"):
        LabelColumns(c.model_)({"photo": []})
    with pytest.raises(InputError, match="rename them, or set id_column"):
        LabelColumns(c.model_)({"image": [], "label": []})


@pytest.mark.slow
def test_the_command_labels_a_folder_by_ray_and_continues(image_folder, tmp_path, capsys):
    """Images that came since are labelled, the others are not labelled again; Parquet files need an id."""
    ray = pytest.importorskip("ray")
    from pyarrow import parquet

    words = ["--encoder", "ssl_exit.encoders.small:digits_encoder", "--size", "8", "--mean", "[0.0]", "--std", "[1.0]",
             "-k", "3", "--max-disagreement", "0.4", "--confidence", "0.5", "--device", "cpu"]  # fmt: skip
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    main(["fit", *words, "--data", str(image_folder), "--out", model])
    by_ray = ["predict", "--engine", "ray", "--model", model, "--data", str(image_folder), "--out", out,
              "--device", "cpu", "--trust", "ssl_exit.encoders.small:digits_encoder"]  # fmt: skip
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        (image_folder / "0" / "broken.png").write_bytes(b"no image")
        main([*by_ray, "--checkpoint", str(tmp_path / "done")])
        assert "61 rows in" in capsys.readouterr().out
        (image_folder / "0" / "new.png").write_bytes(next((image_folder / "1").iterdir()).read_bytes())
        main([*by_ray, "--checkpoint", str(tmp_path / "done")])
        assert "62 rows in" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main(by_ray)
        assert "continue by --checkpoint" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([*by_ray, "--embeddings", "e.npy"])
        assert "are not for --engine ray" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main([*by_ray[:-6], "--data", out, "--out", str(tmp_path / "other")])
        assert "need an id (--id-column)" in capsys.readouterr().err
    finally:
        ray.shutdown()
    rows = {row["path"]: row for row in parquet.read_table(out).to_pylist()}
    assert len(rows) == 62
    here = load(model).run(str(image_folder))
    for path, label in zip(FolderImages(image_folder, Preprocessing(8)).paths, here.labels, strict=True):
        assert rows[str(image_folder / path)]["label"] == label
    assert "UnidentifiedImageError" in rows[str(image_folder / "0" / "broken.png")]["reason"]


@pytest.mark.slow
def test_ray_labels_as_one_process(fitted, pixels):
    """Two actors on two CPUs, with one unreadable image; ids tell which row is which."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    c = fitted
    rows = [{"id": i, "image": encoded(image), "note": "x"} for i, image in enumerate(pixels[:N])]
    rows[7]["image"] = b"no image"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        dataset = ray.data.from_items(rows).repartition(5)
        labelled = label_dataset(dataset, c.model_, id_column="id", actors=2, images_per_call=64, device="cpu")
        table = sorted(labelled.take_all(), key=lambda row: row["id"])
        for numbers in ({"actors": 0}, {"images_per_call": 0}, {"gpus_per_actor": -1}):
            with pytest.raises(InputError, match="actors and images_per_call must be"):
                label_dataset(dataset, c.model_, **numbers)
    finally:
        ray.shutdown()
    assert [row["id"] for row in table] == list(range(N))
    assert set(table[0]) == {"id", "label", "exit", "score", "reason"}
    labels, result = np.array([row["label"] for row in table]), expected(c, pixels)
    good = np.arange(N) != 7
    np.testing.assert_array_equal(labels[good], result.labels[good])
    assert labels[7] == -1
    assert "UnidentifiedImageError" in table[7]["reason"]
