"""A model applied to columns answers as `predict` does."""

import io
import pickle
import tarfile
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
import torch
from PIL import Image

from ssl_exit import InputError, Preprocessing, load
from ssl_exit.cli import main
from ssl_exit.data.image_files import FolderImages
from ssl_exit.scale import LabelColumns, audit_of, label_dataset
from ssl_exit.scale.ray_data import _reason
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
    assert (rows["exit"][~good] == "").all()
    assert (rows["reason"] != "").tolist() == (~good).tolist()
    assert "no image: expected bytes, a path or uint8 pixels" in rows["reason"][4]


def test_cells_that_need_no_preprocessing_are_judged_one_by_one(rgb_digits):
    c = clusterer(untrained("resnet20", rgb_digits), n_clusters=3, max_disagreement=0.2, confidence=0.5)
    c.fit(rgb_digits[:400])
    cells = [*rgb_digits[:6], None, rgb_digits[0][:, :8], "x", [[1.0]]]
    rows = LabelColumns(c.model_)({"image": cells})
    np.testing.assert_array_equal(rows["label"][:6], c.predict(rgb_digits[:6]))
    assert (rows["label"][6:] == -1).all()
    assert (rows["exit"][6:] == "").all()
    assert "expected (3, 32, 32); got (3, 8, 32)" in rows["reason"][7]
    assert "expected numbers" in rows["reason"][8]


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
    with pytest.raises(InputError, match=r"audit must be a share in \[0, 1\]; got 2"):
        LabelColumns(c.model_, audit=2)
    with pytest.raises(InputError, match="rename them, or set id_column"):
        LabelColumns(c.model_)({"image": [], "label": []})


def test_rows_carry_the_audit_and_one_audit_reads_all_of_them(fitted, pixels):
    c, cells = fitted, list(pixels[:N])
    label = LabelColumns(c.model_, audit=1.0)
    rows, full = label({"image": cells}), c.predict_full(torch.from_numpy(pixels[:N]).permute(0, 3, 1, 2))
    early = rows["exit"] != "end"
    assert early.any()
    np.testing.assert_array_equal(rows["audited"], np.where(early, full, -1))
    assert list(label({"image": []})) == list(rows)
    parts = [{name: values[part] for name, values in rows.items()} for part in (slice(40), slice(40, None))]
    audit = audit_of(parts, c.model_, 1.0)
    assert (audit.images, audit.audited) == (N, int(early.sum()))
    assert audit.disagreements == int((rows["label"] != full)[early].sum())
    some = LabelColumns(c.model_, audit=0.3)({"image": cells})["audited"] >= 0
    assert 0 < some.sum() < early.sum()
    assert not some[~early].any()


def test_many_workers_share_one_probability_of_a_false_alarm(fitted):
    """Twenty workers at exactly the disagreement that is certified: one audit of all rows alarms at most so often."""
    model, rng, alarms, redraws = fitted.model_, np.random.default_rng(0), 0, 200
    eps, alpha = 0.1, 0.1
    how = replace(model.settings.calibration, false_alarm=alpha)
    model = replace(
        model,
        settings=replace(model.settings, calibration=how),
        certificate=replace(model.certificate, max_disagreement=eps),
    )
    for _ in range(redraws):
        workers = []
        for _ in range(20):
            labels = np.zeros(200, dtype=np.int64)
            audited = np.where(rng.random(200) < 0.5, (rng.random(200) < eps).astype(np.int64), -1)
            workers.append({"label": labels, "audited": audited})
        alarms += audit_of(workers, model, 0.5).alarm is not None
    assert alarms <= alpha * redraws + 3 * np.sqrt(alpha * (1 - alpha) * redraws)
    drifted = [worker | {"audited": np.where(worker["audited"] >= 0, 1, -1)} for worker in workers]
    assert audit_of(drifted, model, 0.5).alarm is not None


@pytest.mark.slow
def test_the_command_labels_tar_shards_and_parquet_by_ray(image_folder, tmp_path, capsys):
    """Both as predict labels them here, with an audit, and members that are no images among them."""
    ray = pytest.importorskip("ray")
    import pyarrow
    from pyarrow import parquet

    source = FolderImages(image_folder, Preprocessing(8))
    names, contents = list(source.paths), [(image_folder / path).read_bytes() for path in source.paths]
    (shards := tmp_path / "shards").mkdir()
    for i in range(2):
        with tarfile.open(shards / f"{i}.tar", "w") as tar:
            for name, content in [*zip(names[i::2], contents[i::2], strict=True), (f"{i}.txt", b"no image")]:
                (member := tarfile.TarInfo(name)).size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tables := tmp_path / "tables").mkdir()
    parquet.write_table(pyarrow.table({"key": names, "img": contents, "more": names}), tables / "a.parquet")
    words = ["--encoder", "ssl_exit.encoders.small:digits_encoder", "--size", "8", "--mean", "0", "--std", "1",
             "-k", "3", "--max-disagreement", "0.4", "--confidence", "0.5", "--device", "cpu"]  # fmt: skip
    main(["fit", *words, "--data", str(image_folder), "--out", str(tmp_path / "model")])
    by_ray = ["predict", "--engine", "ray", "--model", str(tmp_path / "model"), "--device", "cpu", "--audit", "1.0",
              "--trust", "ssl_exit.encoders.small:digits_encoder"]  # fmt: skip
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        continued = ["--checkpoint", str(tmp_path / "done")]  # the second time nothing is left to do
        for data, more in ((shards, continued), (shards, continued), (tables, ["--id-column", "key"])):
            main([*by_ray, "--data", str(data), "--out", f"{data}-out", *more])
            printed = capsys.readouterr().out
            assert "60 rows in" in printed
            assert "audit: no drift found" in printed
        with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
            tar.add(image_folder)
        with pytest.raises(SystemExit):
            main([*by_ray, "--data", str(tmp_path / "packed.tar"), "--out", str(tmp_path / "none")])
        assert "expected an uncompressed tar file" in capsys.readouterr().err
    finally:
        ray.shutdown()
    here = dict(zip(names, load(tmp_path / "model").run(str(image_folder)).labels, strict=True))
    for out, id_ in (("shards-out", "path"), ("tables-out", "key")):
        rows = {row[id_]: row["label"] for row in parquet.read_table(tmp_path / out).to_pylist()}
        assert {name.partition(".tar/")[2] or name: label for name, label in rows.items()} == here


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


def test_the_reason_of_a_failed_worker_is_one_line_without_the_advice_of_ray():
    advice = "Failed to read after 1/10 attempts.\nTo change retry attempts, configure `ray.data`.\n"
    wrapped = f"\nray.exceptions.UserCodeException: UDF failed to process a data block.\n{advice}"
    assert (
        _reason(f"ray::Read()\n  File 'x'\nValueError: 'a.tar' is none\n{advice}{wrapped}")
        == "ValueError: 'a.tar' is none"
    )
    assert _reason("\nThe worker died.\nMore.") == "The worker died."
    assert _reason("") == "no reason given"


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
