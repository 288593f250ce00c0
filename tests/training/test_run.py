"""Training as users run it: killed, resumed, on full disks, with broken files, and by two processes."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssl_exit import load
from ssl_exit.cli import main
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.settings import Optimization
from ssl_exit.training.contrastive import MoCo, SimCLR
from ssl_exit.training.distillation import SelfDistillation
from ssl_exit.training.logs import read_curve
from ssl_exit.training.methods import build_training
from ssl_exit.training.monitor import knn_accuracy_predictions
from ssl_exit.training.run import newest_checkpoint, seeded, train

COMMON = ["--encoder", "ssl_exit.encoders.small:digits_encoder", "--data", "digits", "--size", "8", "--mean", "[0.0]"]
COMMON += ["--std", "[1.0]", "--views", "drawing", "--optimizer", "adamw", "--learning-rate", "0.002"]
COMMON += ["--device", "cpu"]


def command(out, *more) -> list[str]:
    precise = [] if "--precision" in more else ["--precision", "32-true"]
    return ["train", *COMMON, *precise, "--out", str(out), *more]


def start(words, **more) -> subprocess.Popen:
    program = Path(sys.executable).with_name("ssl-exit")
    return subprocess.Popen([program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def joined(one: Path, two: Path) -> None:
    """Check that two trainings, the second one resumed, came to the same."""
    curves = [read_curve(out) for out in (one, two)]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    assert [loss for _, loss in curves[1]] == pytest.approx([loss for _, loss in curves[0]], rel=1e-4)
    assert len(curves[0]) >= 5
    whole, resumed = (load_file(out / "encoder.safetensors") for out in (one, two))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_it_goes_on_as_if_nothing_had_been(tmp_path):
    words = ["--options.exit_weight", "1.0", "--epochs", "6"]
    main(command(tmp_path / "whole", *words))
    process = start(command(tmp_path / "killed", *words))
    checkpoints = tmp_path / "killed" / "checkpoints"
    until = time.monotonic() + 120
    while not list(checkpoints.glob("epoch-0001*.ckpt")) and time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "encoder.safetensors").exists()
    main(command(tmp_path / "killed", *words, "--resume", "true"))
    joined(tmp_path / "whole", tmp_path / "killed")
    assert len(list(checkpoints.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--method", "moco", "--options.bank", "600"],
        ["--method", "distill", "--options.rounds", "2", "--options.mirror", "false"],  # stopped within a round
        ["--precision", "bf16-mixed", "--logger", "csv"],
    ],
)
def test_stopped_and_resumed_likewise(tmp_path, words, monkeypatch):
    words = [*words, "--epochs", "5", "--batch-size", "120"]
    main(command(tmp_path / "whole", *words))

    def stop(self, trainer, module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssl_exit.training.monitor.NeighbourMonitor.on_train_epoch_start", stop, raising=False)
        with pytest.raises(SystemExit) as stopped:
            main(command(tmp_path / "stopped", *words))
    assert stopped.value.code == 130
    main(command(tmp_path / "stopped", *words, "--resume", "true"))
    joined(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_images_that_workers_fetch_ahead_come_in_the_same_order_after_a_stop(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("ssl_exit.training.loader.MEMORY_SHARE", 0)
    words = ["--epochs", "4", "--batch-size", "10", "--num-workers", "2", "--monitor-share", "0"]
    words += ["--data", str(image_folder)]
    seen: list[tuple[int, list[int]]] = []
    stop_at = None
    losses = SimCLR.losses

    def noted(self, target, views):
        if self.current_epoch == stop_at:
            raise KeyboardInterrupt
        seen.append((self.current_epoch, target.tolist()))
        return losses(self, target, views)

    monkeypatch.setattr(SimCLR, "losses", noted)
    main(command(tmp_path / "whole", *words))
    whole, seen, stop_at = seen, [], 2
    with pytest.raises(SystemExit):
        main(command(tmp_path / "stopped", *words))
    stop_at = None
    main(command(tmp_path / "stopped", *words, "--resume", "true"))
    assert len(whole) == 24
    assert seen == whole


@pytest.mark.slow
def test_what_it_writes_can_be_fitted_and_says_how_near_neighbours_are(tmp_path, capsys, image_folder):
    main(command(tmp_path / "run", "--epochs", "8", "--monitor-every", "4", "--monitor-share", "0.2"))
    assert "8 epochs; encoder written to" in capsys.readouterr().out
    steps, accuracies = zip(*read_curve(tmp_path / "run", "knn"), strict=True)
    assert len(steps) == 2
    assert 0.7 < accuracies[-1] <= 1
    data = ["--data", str(image_folder), "--out", str(tmp_path / "model")]
    weights = ["--weights", str(tmp_path / "run" / "encoder.safetensors")]
    main(["fit", *COMMON[:2], *weights, *data, "--n-clusters", "4"])
    model = load(tmp_path / "model", device="cpu")
    assert model.preprocessing == Preprocessing(8, (0.0,), (1.0,))  # as in training
    with pytest.warns(UserWarning, match="were trained with .*size=8.* used with .*size=16"):
        main(["fit", *COMMON[:2], *weights, *data[:2], "--out", str(tmp_path / "other"), "--size", "16"])


def test_a_folder_with_training_is_not_written_over_nor_resumed_with_other_settings(tmp_path, capsys):
    main(command(tmp_path, "--epochs", "1"))
    for more, message in [
        (["--epochs", "1"], "holds a training already; resume it"),
        (["--epochs", "2", "--resume", "true"], "other settings: epochs: 1 then, 2 now"),
        (["--epochs", "1", "--resume", "true", "--options.temperature", "0.9"], "other settings: options"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(command(tmp_path, *more))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_other_hyperparameters_are_not_gone_on_with_in_python_either(tmp_path, digits):
    options = {"epochs": 1, "batch_size": 50, "out": tmp_path, "progress": False}
    train(module_of(digits), digits[:100], **options)
    train(module_of(digits), digits[:100], **options, resume=True)
    other = module_of(digits)
    other.optimization = replace(other.optimization, learning_rate=5.0)
    with pytest.raises(InputError, match="other settings: module optimization"):
        train(other, digits[:100], **options, resume=True)
    same = (other.tapped, other.views, other.preprocessing, module_of(digits).optimization)
    with pytest.raises(InputError, match="other settings: module options"):
        train(SimCLR(*same, temperature=0.9), digits[:100], **options, resume=True)
    for one, two in [
        (SimCLR(*same), SimCLR(*same, exit_weight=1.0)),
        (MoCo(*same), MoCo(*same, bank=64)),
        (SelfDistillation(*same), SelfDistillation(*same, mutual=0.5)),
    ]:
        assert one.options != two.options


def test_a_damaged_checkpoint_is_named_with_the_one_to_resume_from(tmp_path, capsys):
    main(command(tmp_path, "--epochs", "3"))
    newest = tmp_path / "checkpoints" / "epoch-0002.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        main(command(tmp_path, "--epochs", "3", "--resume", "true"))
    error = capsys.readouterr().err
    assert f"checkpoint '{newest}' cannot be read" in error
    assert "delete it, to resume from epoch-0001.ckpt" in error
    newest.unlink()
    main(command(tmp_path, "--epochs", "3", "--resume", "true"))


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_checkpoint(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes a file
    try:
        with pytest.raises(SystemExit) as stop:
            main(command(tmp_path, "--epochs", "1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert "free some space" in error
    assert not list((tmp_path / "checkpoints").glob("*"))


def module_of(images, learning_rate=2e-3):
    with seeded(0):
        encoder = digits_encoder()
        tapped = TappedEncoder.build(encoder, "auto", torch.zeros(1, 1, 8, 8))
        how = Optimization("adamw", learning_rate, schedule="one_cycle")
        return build_training("simclr", tapped, Preprocessing(8, (0.0,), (1.0,)), views="drawing", optimization=how)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_the_last_good_checkpoint(tmp_path, digits):
    module = module_of(digits)
    views, calls = module.views, []

    def break_in_the_second_epoch(pixels):
        calls.append(1)
        return views(pixels) * (torch.nan if len(calls) > 2 * 7 else 1)

    module.views = break_in_the_second_epoch
    with pytest.raises(InputError, match=r"the loss became nan at step 7; last good checkpoint: .*epoch-0000.ckpt"):
        train(module, digits[:450], epochs=3, batch_size=64, out=tmp_path, progress=False)
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["epoch-0000.ckpt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 128}, "100 images do not fill one batch of 128"),
        ({"epochs": 0}, r"epochs must be a whole number in \[1, inf\)"),
        ({"batch_size": 1}, r"batch_size must be a whole number in \[2, inf\)"),
        ({"logger": "wandb"}, "logger must be one of"),
        ({"device": "cuda:1"}, "device must be one of"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"resume": True}, "resume needs a folder"),
    ],
)
def test_what_cannot_be_run(digits, options, message):
    with pytest.raises(InputError, match=message):
        train(module_of(digits), digits[:100], **{"epochs": 1, "batch_size": 50} | options)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    assert newest_checkpoint(tmp_path, True) is None


def test_neighbours_name_classes_as_a_slow_vote_does():
    torch.manual_seed(0)
    bank, queries = torch.randn(30, 4), torch.randn(5, 4)
    classes = torch.randint(3, (30,)).numpy()
    expected = []
    for q in torch.nn.functional.normalize(queries, dim=1):
        votes = [0.0] * 3
        for b, c in zip(torch.nn.functional.normalize(bank, dim=1), classes, strict=True):
            votes[c] += float(torch.exp(q @ b / 0.1))
        expected.append(max(range(3), key=votes.__getitem__))
    assert knn_accuracy_predictions(bank, queries, classes).tolist() == expected


@pytest.mark.slow
def test_two_processes_train_one_encoder(tmp_path):
    """Batches are shared and negatives gathered, or the loss could not be as large: near ln 255, not ln 127."""
    process = start(command(tmp_path, "--epochs", "2", "--devices", "2", "--monitor-share", "0"))
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert out.count("encoder written to") == 1
    main(command(tmp_path / "alone", "--epochs", "2", "--monitor-share", "0"))
    two, one = read_curve(tmp_path), read_curve(tmp_path / "alone")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert two[0][1] == pytest.approx(one[0][1], abs=0.3)  # views and batch statistics differ


def test_logs_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="holds no CSV logs"):
        read_curve(Path(tmp_path))
