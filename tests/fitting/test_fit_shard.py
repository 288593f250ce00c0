"""A fit by many jobs or processes comes to the model of one, however images are divided among them."""

import os
import pickle
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch

from ssl_exit import InputError, load
from ssl_exit.cli import main
from ssl_exit.data.image_files import FolderImages
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.fitting.fit_shard import CERTIFY, FIT, SHAPE, roles_of
from ssl_exit.fitting.parts import MERGED, read_part
from ssl_exit.scale import DistributedShard, PartWritten, StoredShard, merge_parts
from ssl_exit.settings import Settings
from tests.conftest import clusterer

HOW = {"n_clusters": 3, "max_disagreement": 0.1, "confidence": 0.9, "exits": ["block2"], "descriptor": "average"}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return digits_encoder()


def by_jobs(encoder, shards, folder, **how):
    """The model that every job comes to, each run again after every merge."""
    folders = [folder / str(i) for i in range(len(shards))]
    while True:
        models = []
        for images, place in zip(shards, folders, strict=True):
            with suppress(PartWritten):
                models.append(clusterer(encoder, **HOW | how).fit(images, shard=StoredShard(place)).model_)
        if models:
            assert len(models) == len(shards)
            return models
        merge_parts(folders)


def unlike(images, n):
    """Shards in the order of brightness."""
    return images[images.flatten(1).sum(1).argsort(stable=True)].tensor_split(n)


@pytest.fixture(scope="module")
def whole(encoder, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (model,) = by_jobs(encoder, [digits], folder)
    return model, folder / "0"


@pytest.mark.parametrize("n", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_unlike_shards_come_to_the_model_of_one_process(encoder, digits, whole, tmp_path, n):
    one, folder = whole
    for model in by_jobs(encoder, unlike(digits, n), tmp_path):
        assert model.cascade.exit_names == one.cascade.exit_names
        assert torch.equal(model.cascade.final.centroids, one.cascade.final.centroids)
        np.testing.assert_allclose(model.cascade.thresholds, one.cascade.thresholds, rtol=1e-5)
        assert model.certificate.n == one.certificate.n > 200
        assert model.certificate.disagreements == one.certificate.disagreements
        assert model.certificate.early == one.certificate.early > 0.5
        assert model.certificate.issued_for["images"] == one.certificate.issued_for["images"]
        np.testing.assert_array_equal(model.provenance.images, one.provenance.images)
    ours, theirs = (read_part(place / "2-statistics.merged", MERGED)["value"] for place in (folder, tmp_path / "0"))
    for a, b in zip(ours.exits, theirs.exits, strict=True):
        for name in ("counts", "sums", "scatter"):
            scale = getattr(a, name).abs().max()
            assert ((getattr(a, name) - getattr(b, name)).abs().max() / scale) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"guarantee": "exit", "confidence": 0.5, "exits": "auto"}, {"rule": "mlp"}])
def test_finer_guarantees_and_trained_heads(encoder, digits, tmp_path, how):
    one, *_ = by_jobs(encoder, [digits], tmp_path / "one", **how)
    two = by_jobs(encoder, unlike(digits, 2), tmp_path / "two", **how)
    for model in two:
        assert model.certificate.to_dict() == one.certificate.to_dict() | {
            "issued_for": model.certificate.issued_for,
        }
        np.testing.assert_allclose(model.cascade.thresholds, one.cascade.thresholds, rtol=1e-4, atol=1e-5)


def test_copies_in_other_shards_count_once(encoder, digits, whole, tmp_path):
    one, _ = whole
    shards = [torch.cat([digits[:900], digits[:50]]), torch.cat([digits[900:], digits[:400]])]
    for model in by_jobs(encoder, shards, tmp_path):
        assert model.certificate.n == one.certificate.n
        assert model.certificate.issued_for["images"] == one.certificate.issued_for["images"]


def test_roles_fall_into_the_shares_that_settings_ask_for():
    hashes = np.random.default_rng(0).integers(2**64, size=100_000, dtype=np.uint64)
    settings = Settings.from_flat({"holdout": 0.2})
    roles = roles_of(hashes, settings)
    for role, share in ((FIT, 0.8), (SHAPE, 0.05), (CERTIFY, 0.15)):
        assert abs((roles == role).mean() - share) < 0.005
    other = roles_of(hashes, Settings.from_flat({"holdout": 0.2, "seed": 1}))
    assert abs((other[roles == CERTIFY] == CERTIFY).mean() - 0.15) < 0.02
    low = np.sort(hashes)[:20_000]  # those that the sample is taken from
    assert abs((roles_of(low, settings) == FIT).mean() - 0.8) < 0.01


def test_what_cannot_be_merged_is_refused(encoder, digits, tmp_path):
    def part(images, folder, **how):
        with pytest.raises(PartWritten, match=r"part of step 1 \(sample\) written to"):
            clusterer(encoder, **HOW | how).fit(images, shard=StoredShard(tmp_path / folder))
        return tmp_path / folder

    a, b, c = part(digits[:900], "a"), part(digits[900:], "b"), part(digits[900:], "c", max_disagreement=0.2)
    with pytest.raises(InputError, match="they differ in max_disagreement"):
        merge_parts([a, c])
    with pytest.raises(InputError, match="named twice"):
        merge_parts([a, a])
    with pytest.raises(InputError, match="there are no parts of a fit in"):
        merge_parts([a, tmp_path / "nowhere"])
    assert merge_parts([a, b]) == "step 1 (sample) of 2 parts merged; run the jobs again"
    with pytest.raises(PartWritten, match=r"part of step 2 \(statistics\)"):
        clusterer(encoder, **HOW).fit(digits[:900], shard=StoredShard(a))
    with pytest.raises(InputError, match="is a step behind the others"):
        merge_parts([a, b])
    (b / "1-sample.merged").unlink()  # as if the merge had been killed between the two
    assert merge_parts([a, b]) == "step 1 (sample) of 2 parts merged; run the jobs again"
    with pytest.raises(InputError, match=r"is of another fit \(other max_disagreement"):
        clusterer(encoder, **HOW | {"max_disagreement": 0.3}).fit(digits[:900], shard=StoredShard(a))
    with pytest.raises(InputError, match=r"is of another fit \(other the number of images"):
        clusterer(encoder, **HOW).fit(digits[:800], shard=StoredShard(a))
    (b / "1-sample.part").write_bytes((c / "1-sample.part").read_bytes())
    with pytest.raises(InputError, match="merge again"):
        clusterer(encoder, **HOW).fit(digits[900:], shard=StoredShard(b))
    for wrong in ({"front": "auto"}, {"n_clusters": "auto"}, {"mirror": True}, {"exits": []}):
        with pytest.raises(InputError, match="which needs all images in one process"):
            clusterer(encoder, **HOW | wrong).fit(digits, shard=StoredShard(tmp_path / "d"))
    with pytest.raises(InputError, match="neither y nor sample_weight"):
        clusterer(encoder, **HOW).fit(digits, sample_weight=np.ones(len(digits)), shard=StoredShard(tmp_path / "d"))
    with pytest.raises(InputError, match=r"torch\.distributed is not initialized"):
        DistributedShard()


def test_what_changes_between_runs_of_a_job_is_found_out(encoder, digits, tmp_path, monkeypatch):
    """Other images, other clusters, a folder that is left out: no certificate of what nobody counted."""
    halves, folders = digits.tensor_split(2), [tmp_path / "a", tmp_path / "b"]

    def run(images, i, shard=None):
        return clusterer(encoder, **HOW).fit(images, shard=shard or StoredShard(folders[i]))

    def step(*order):
        for i, own in enumerate(order):
            with pytest.raises(PartWritten):
                run(halves[own], i)

    with pytest.raises(PartWritten):
        run(halves[0][:898], 0, StoredShard(tmp_path / "twice"))
    with pytest.raises(PartWritten):
        run(halves[0][:898], 0, StoredShard(tmp_path / "again"))
    with pytest.raises(InputError, match="shards 0 and 1 have the same images"):
        merge_parts([tmp_path / "twice", tmp_path / "again"])

    step(0, 1)
    merge_parts(folders)
    with pytest.raises(InputError, match="images are others than when it first read them"):
        run(digits[torch.randperm(len(digits))[: len(halves[0])]], 0)
    one = StoredShard(folders[0])  # an object that serves several runs begins anew
    for _ in range(2):
        with pytest.raises(PartWritten, match=r"step 2 \(statistics\)"):
            run(halves[0], 0, one)
    with pytest.raises(PartWritten):
        run(halves[1], 1)
    with pytest.raises(InputError, match="steps before statistics were merged from 2 folders; name all of them, got 1"):
        merge_parts(folders[:1])
    merge_parts(folders)
    for _ in range(2):
        step(0, 1)
        merge_parts(folders)
    whole = [run(half, i).model_ for i, half in enumerate(halves)]
    assert whole[0].certificate.n == whole[1].certificate.n > 200

    from ssl_exit.fitting.sample import Clustering

    real = Clustering.of
    monkeypatch.setattr(Clustering, "of", lambda self, sample: shifted(*real(self, sample)))
    with pytest.raises(InputError, match="computed with other clusters or rules than this run comes to"):
        run(halves[0], 0)


def shifted(final, n):
    """As another machine's k-means might come out."""
    final.centroids += 0.5 * torch.randn(final.centroids.shape, generator=torch.Generator().manual_seed(0))
    return final, n


def test_what_is_private_is_in_no_part(encoder, image_folder, tmp_path):
    (image_folder / "0" / "John_Smith.png").write_bytes(b"no image")
    source = FolderImages(image_folder, Preprocessing(8, (0.0,), (1.0,)))
    with pytest.raises(PartWritten):
        clusterer(encoder, **HOW).fit(source, shard=StoredShard(tmp_path / "a"))
    merge_parts([tmp_path / "a"])
    with pytest.raises(PartWritten):
        clusterer(encoder, **HOW).fit(source, shard=StoredShard(tmp_path / "a"))
    parts = [file for file in (tmp_path / "a").iterdir() if file.suffix in (".part", ".merged")]
    assert len(parts) == 3
    assert not any(b"John_Smith" in file.read_bytes() for file in parts)
    assert b"John_Smith" in (tmp_path / "a" / "1-sample.own").read_bytes()


def test_without_held_out_images(encoder, digits, tmp_path):
    (model,) = by_jobs(encoder, [digits[:300]], tmp_path, holdout=0.0)
    assert model.certificate.n == 0
    assert model.certificate.early == 0


def test_unusable_images_are_told_of_as_in_one_process(encoder, digits, tmp_path):
    images = digits.clone()
    images[::30] = float("nan")
    with pytest.warns(UserWarning, match="60 of 1797 images could not be used"):
        (model,) = by_jobs(encoder, [images], tmp_path)
    assert sorted(i for i, why in model.provenance.skipped.items() if "NaN" in why) == list(range(0, 1797, 30))


def test_no_more_images_shape_than_memory_allows_whoever_has_them(encoder, digits, tmp_path, monkeypatch):
    from ssl_exit.fitting import fit_shard as module

    monkeypatch.setattr(module, "most_shaping", lambda numbers: 60)
    (one,) = by_jobs(encoder, [digits], tmp_path / "one")
    two = by_jobs(encoder, digits.tensor_split([1700]), tmp_path / "two")
    assert len(one.provenance.shaped) == 60
    np.testing.assert_array_equal(np.sort(two[1].provenance.shaped), np.sort(one.provenance.shaped))
    np.testing.assert_allclose(two[0].cascade.thresholds, one.cascade.thresholds, rtol=1e-5)


def test_the_encoder_first_runs_on_what_may_be_in_the_sample(encoder, digits, monkeypatch):
    from ssl_exit.fitting import fit_shard as module

    described, real = [], module.described_sample

    def counted(tapped, batch, *more):
        described.append(len(batch.indices))
        return real(tapped, batch, *more)

    monkeypatch.setattr(module, "described_sample", counted)
    monkeypatch.setattr(module, "sample_size", lambda *_: 100)
    from ssl_exit.fitting.shards import Shard

    model = clusterer(encoder, **HOW, batch_size=64).fit(digits, shard=Shard()).model_
    assert model.provenance.n_sample == 100
    assert 100 <= sum(described) < 600


class _Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_parts_that_are_none_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a" / "1-sample.part"
    file.parent.mkdir()
    about = {"after": "", "derived": "", "jobs": 0, "step": "sample"}
    values = {"kind": {"kind": "PosixPath"}, "fields": {"kind": "Sample", "keys": 1}, "command": _Command(),
              "number": 3, "array": {"array": [1], "dtype": "int64"}}  # fmt: skip
    for name, value in values.items():
        torch.save(about | {"value": value}, tmp_path / name)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights")
    torch.save(about, tmp_path / "nothing")
    others = [(tmp_path / name).read_bytes() for name in (*values, "weights", "nothing")]
    for content in (b"", b"no part", pickle.dumps(_Command()), *others):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is no part of a fit, or damaged"):
            merge_parts([tmp_path / "a"])
    assert not (tmp_path / "executed").exists()


FIT_WORDS = ["fit", "--encoder", "ssl_exit.encoders.small:digits_encoder", "--size", "8", "--mean", "0", "--std", "1",
             "-k", "3", "--max-disagreement", "0.4", "--confidence", "0.5", "--device", "cpu",
             "--exits", "block1", "block2"]  # fmt: skip


def test_the_command_fits_by_jobs(image_folder, tmp_path, capsys):
    (image_folder / "0" / "broken.png").write_bytes(b"no image")
    parts = [str(tmp_path / name) for name in "abc"]
    words = [*FIT_WORDS, "--data", str(image_folder), "--out", str(tmp_path / "model")]
    for _ in range(6):
        for i, part in enumerate(parts, start=1):
            main([*words, "--part", part, "--shard", f"{i}/3"])
        if (tmp_path / "model").exists():
            break
        assert "ssl-exit fit --merge FOLDERS, and run this again" in capsys.readouterr().out
        main(["fit", "--merge", *parts])
    printed = capsys.readouterr()
    assert "certificate: " in printed.out
    assert "broken.png" in printed.err
    c = load(tmp_path / "model")
    source = FolderImages(image_folder, Preprocessing(8, (0.0,), (1.0,)))
    with pytest.warns(UserWarning, match="1 of 61 images could not be used"):
        assert set(c.predict(source)) == {-1, 0, 1, 2}
    for wrong, message in (
        (["--shard", "2/3"], "--shard is for jobs that write a --part"),
        (["--part", parts[0], "--shard", "4/3"], "--shard is a share such as 2/5"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", "--data", str(image_folder)])
    assert "fit needs --encoder, --data and --out" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_fits_as_one_process(image_folder, tmp_path, monkeypatch):
    """The command under torchrun with two processes, and one job alone; encoders that differ are found out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\n\nfrom ssl_exit.encoders.small import digits_encoder\n\n\n"
        "def encoder():\n    torch.manual_seed(0)\n    return digits_encoder()\n"
    )
    words = [*FIT_WORDS, "--data", str(image_folder), "--encoder", "mine:encoder"]
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ssl_exit",
    ]
    both = {"cwd": tmp_path, "timeout": 300, "check": True}
    subprocess.run([*start, *words, "--out", tmp_path / "two"], **both)
    part = ["--part", str(tmp_path / "part")]
    while not (tmp_path / "one").exists():
        main([*words, "--out", str(tmp_path / "one"), *part])
        if not (tmp_path / "one").exists():
            main(["fit", "--merge", part[1]])
    one, two = (load(tmp_path / name, trust="mine:encoder").model_ for name in ("one", "two"))
    assert torch.equal(one.cascade.final.centroids, two.cascade.final.centroids)
    assert one.cascade.exit_names == two.cascade.exit_names
    np.testing.assert_allclose(one.cascade.thresholds, two.cascade.thresholds, rtol=1e-4)
    assert one.certificate.issued_for["images"] == two.certificate.issued_for["images"]
    assert one.certificate.disagreements == two.certificate.disagreements
    unlike = [*start, *words[:-1], "ssl_exit.encoders.small:digits_encoder", "--out", tmp_path / "three"]
    failed = subprocess.run(unlike, **both | {"check": False}, capture_output=True, text=True)
    assert "shards 0 and 1 are not of one fit: they differ in encoder" in failed.stderr
    assert not (tmp_path / "three").exists()


FAILING = """
import sys, torch
from torch import distributed
from ssl_exit import ExitClusterer, InputError
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.fitting import fit_shard, shards
from ssl_exit.scale import DistributedShard

meet, rank, broken, where = sys.argv[1:]
distributed.init_process_group("gloo", init_method=meet, rank=int(rank), world_size=2)
torch.manual_seed(0)
images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(int(rank)))

def fail(*_, **__):
    raise MemoryError()

if rank == broken:
    images = images[:0] if where == "images" else images
    if where == "later":
        fit_shard.collected = fail
    elif where == "merge":
        shards.STEPS["statistics"] = fail
    elif where == "gone":
        fit_shard.collected = lambda *_, **__: sys.exit(3)
try:
    ExitClusterer(digits_encoder(), 3, exits=["block2"]).fit(images, shard=DistributedShard())
except (InputError, MemoryError) as error:
    print(type(error).__name__, error)
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "where", "why"),
    [
        ("0", "images", "there are no images: the data are empty"),
        ("1", "images", "there are no images: the data are empty"),
        ("0", "later", "MemoryError"),
        ("1", "later", "MemoryError"),
        ("0", "merge", "MemoryError"),
    ],
)
def test_a_process_that_fails_tells_the_others(tmp_path, broken, where, why):
    (tmp_path / "fit.py").write_text(FAILING)
    words = [sys.executable, tmp_path / "fit.py", f"file://{tmp_path / 'meet'}"]
    both = [subprocess.Popen([*words, rank, broken, where], stdout=subprocess.PIPE, text=True) for rank in "01"]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(why in each for each in said), said


@pytest.mark.slow
def test_a_process_that_is_gone_is_one_error(tmp_path):
    """One is killed between two steps; the other says so in a line, and does not wait for ever."""
    (tmp_path / "fit.py").write_text(
        FAILING.replace("sys.exit(3)", "os._exit(3)").replace("import sys", "import os, sys")
    )
    words = [sys.executable, tmp_path / "fit.py", f"file://{tmp_path / 'meet'}"]
    both = [subprocess.Popen([*words, rank, "1", "gone"], stdout=subprocess.PIPE, text=True) for rank in "01"]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert both[1].returncode == 3
    assert "InputError another process of this fit is gone" in said[0]
