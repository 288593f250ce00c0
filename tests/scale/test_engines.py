"""The recipes of docs/scale.md for Daft, Spark and Ray, where these are installed."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.scale import LabelColumns, PartWritten, StoredShard, merge_parts
from tests.conftest import clusterer

N = 60


@pytest.fixture(scope="module")
def fitted(digits, tmp_path_factory):
    """A model's folder, encoded images, and their labels in one process."""
    torch.manual_seed(0)
    options = {"n_clusters": 3, "max_disagreement": 0.2, "confidence": 0.5, "exits": ["block2"]}
    pixels = (digits * 255).byte()
    c = clusterer(digits_encoder(), Preprocessing(8, (0.0,), (1.0,)), **options).fit(pixels[:1000])
    c.save(tmp_path_factory.mktemp("model") / "model")
    images = []
    for image in pixels[-N:, 0].numpy():
        Image.fromarray(image).save(file := io.BytesIO(), "PNG")
        images.append(file.getvalue())
    return c, images, c.predict(pixels[-N:])


@pytest.mark.slow
def test_daft(fitted):
    daft = pytest.importorskip("daft")
    pyarrow = pytest.importorskip("pyarrow")
    c, images, expected = fitted
    types = daft.DataType
    row = types.struct(
        {"label": types.int64(), "exit": types.string(), "score": types.float32(), "reason": types.string()}
    )

    @daft.cls
    class Label:
        def __init__(self, model):
            self.label = LabelColumns(model)

        @daft.method.batch(return_dtype=row, batch_size=1024)
        def __call__(self, images):
            rows = self.label({"image": images.to_pylist()})
            return pyarrow.StructArray.from_arrays([pyarrow.array(rows[name]) for name in rows], list(rows))

    table = daft.from_pydict({"id": list(range(N)), "image": images})
    labelled = table.select("id", Label(c.model_)(table["image"]).alias("row")).to_pydict()
    labels = {i: each["label"] for i, each in zip(labelled["id"], labelled["row"], strict=True)}
    np.testing.assert_array_equal([labels[i] for i in range(N)], expected)


@pytest.mark.slow
def test_spark(fitted, monkeypatch):
    pyspark = pytest.importorskip("pyspark.sql")
    pyarrow = pytest.importorskip("pyarrow")
    c, images, expected = fitted
    label = LabelColumns(c.model_, id_column="id")

    def labelled(batches):
        for batch in batches:
            yield from label(pyarrow.Table.from_batches([batch])).to_batches()

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    try:
        spark = pyspark.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    except Exception as error:
        pytest.skip(f"Spark does not start here: {error}")
    try:
        table = spark.createDataFrame(list(enumerate(images)), "id long, image binary")
        types = "id long, label long, exit string, score float, reason string"
        rows = {row["id"]: row["label"] for row in table.mapInArrow(labelled, types).collect()}
    finally:
        spark.stop()
    np.testing.assert_array_equal([rows[i] for i in range(N)], expected)


def test_the_cluster_of_the_examples_is_one_that_ray_takes():
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((Path(__file__).parents[2] / "examples" / "ray-cluster.yaml").read_text())
    util.validate_config(util.prepare_config(config))


@pytest.mark.slow
def test_ray_tasks_fit_by_parts(digits, tmp_path):
    """Tasks on any machines write parts, which the driver merges; a task that dies is run again."""
    ray = pytest.importorskip("ray")
    torch.manual_seed(0)
    encoder, folders = digits_encoder(), [tmp_path / "a", tmp_path / "b"]
    how = {"n_clusters": 3, "max_disagreement": 0.2, "confidence": 0.5, "exits": ["block2"], "device": "cpu"}

    def part(images, folder):
        try:
            return clusterer(encoder, **how).fit(images, shard=StoredShard(folder)).model_
        except PartWritten:
            return None

    (alone := tmp_path / "alone").mkdir()
    while (one := part(digits, alone)) is None:
        merge_parts([alone])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(part)
        while True:
            models = ray.get([task.remote(*each) for each in zip(digits.tensor_split(2), folders, strict=True)])
            if None not in models:
                break
            merge_parts(folders)
    finally:
        ray.shutdown()
    for model in models:
        assert torch.equal(model.cascade.final.centroids, one.cascade.final.centroids)
        np.testing.assert_allclose(model.cascade.thresholds, one.cascade.thresholds, rtol=1e-5)
