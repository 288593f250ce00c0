"""Flower carries the same questions and answers."""

import compileall
import json
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssl_exit import InputError
from ssl_exit.cli import main
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.federated import Client, Federation, fit_federated, local_clients
from tests.conftest import clusterer

HOW = {"n_clusters": 4, "max_disagreement": 0.1, "confidence": 0.9, "exits": ["block2"], "descriptor": "average"}


@pytest.fixture
def flower(monkeypatch):
    """The transport, in a process that a SuperLink would have given a run."""
    module = pytest.importorskip("ssl_exit.federated.flower")
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return module


def test_messages_carry_arrays_as_they_are(flower):
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.asarray(2.5), "c": np.empty((0, 4), np.float32)}
    from flwr.app import Message

    message = Message(flower._packed(arrays, {"question": "lloyd"}), 7, flower.ASK)
    back = flower._arrays(message)
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)
    assert message.content[flower.ABOUT]["question"] == "lloyd"


class Nodes:
    """A Grid of so many nodes, of which some fail."""

    def __init__(self, app, failing=()):
        from flwr.app import Context, Error, Message, RecordDict

        self.app, self.failing, self.make, self.error = app, failing, Message, Error
        self.contexts = {
            i: Context(run_id=1, node_id=i, node_config={"partition-id": i - 1}, state=RecordDict(), run_config={})
            for i in (1, 2, 3)
        }

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout):
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.failing:
                reply = self.make(self.error(1, "Traceback\n  its reason\n"), reply_to=message)
            else:
                reply = self.app(message, self.contexts[node])
            yield reply


def test_the_app_answers_as_the_client_does(flower, digits):
    torch.manual_seed(0)
    encoder = digits_encoder().eval()
    parts = digits.tensor_split(3)

    def client(i):
        return Client(clusterer(encoder, **HOW), parts[i])

    here, there = clusterer(encoder, **HOW), clusterer(encoder, **HOW)
    report = fit_federated(here, local_clients({i: client(i) for i in range(3)}), Federation(rounds=3))
    app = flower.client_app(lambda context: client(int(context.node_config["partition-id"])))
    again = fit_federated(there, flower.flower_clients(Nodes(app)), Federation(rounds=3))
    np.testing.assert_array_equal(here.predict(digits), there.predict(digits))
    theirs = there.model_.cascade.tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in here.model_.cascade.tensors().items())
    assert report.bytes_up == again.bytes_up
    with pytest.warns(UserWarning, match="client 2 is left out, hello: its app failed: its reason"):
        fit_federated(there, flower.flower_clients(Nodes(app, failing=[2])), Federation(rounds=1))

    def broken(context):
        raise InputError("there are no images: the data are empty")

    with (
        pytest.warns(UserWarning, match="no images"),
        pytest.raises(InputError, match="0 of 3 clients answered 'hello'"),
    ):
        fit_federated(there, flower.flower_clients(Nodes(flower.client_app(broken))), Federation())
    with pytest.raises(InputError, match="3 of 9 nodes came within 0 s"):
        flower.flower_clients(Nodes(app), nodes=9, wait=0)


def test_a_new_app_is_complete(tmp_path, capsys):
    folder = tmp_path / "app"
    main(["federated", "new", str(folder)])
    assert "flwr run" in capsys.readouterr().out
    config = tomllib.loads((folder / "pyproject.toml").read_text())
    assert config["tool"]["flwr"]["app"]["components"]["clientapp"] == "exits_app.client_app:app"
    assert compileall.compile_dir(folder, quiet=1)
    used = {word for file in folder.glob("exits_app/*.py") for word in file.read_text().split('"')[1::2]}
    assert config["tool"]["flwr"]["app"]["config"].keys() <= used
    with pytest.raises(SystemExit):
        main(["federated", "new", str(folder)])
    assert "exists and holds something" in capsys.readouterr().err


def test_a_federated_command_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["federated", "nwe"])
    assert "did you mean 'federated new'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demonstration_is_cheaper_together_than_alone(tmp_path, capsys):
    main(["federated", "demo", "--out", str(tmp_path), "--epochs", "20", "--clients", "5"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["federated"]["cost_macs"] < report["local"]["cost_macs"]
    assert report["federated"]["acc"] > report["local"]["acc"]
    assert len(report["clients"]) == 5
    assert report["bytes_up"] == sum(row["bytes_up"] for row in report["clients"])
    assert "worst client" in printed
    assert (tmp_path / "federated.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_new_app_runs_in_flowers_simulation(tmp_path, monkeypatch):
    """Two SuperNodes in actors of Ray, by the app that `federated new` writes."""
    pytest.importorskip("flwr.simulation")
    from importlib import import_module

    from flwr.simulation import run_simulation

    folder = tmp_path / "app"
    main(["federated", "new", str(folder)])
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    task, server = import_module("exits_app.task"), import_module("exits_app.server_app")
    own = config | {"rounds": 3}

    def configured(context):  # which `flwr run` does
        return SimpleNamespace(node_config=context.node_config, run_config=own)

    def client(context):
        return Client(task.clusterer(own), task.images(configured(context)))

    def main_of_server(grid, context):
        server.main(grid, configured(context))

    from flwr.serverapp import ServerApp

    from ssl_exit.federated.flower import client_app

    app = ServerApp()
    app.main()(main_of_server)
    run_simulation(
        app, client_app(client), 2, backend_config={"init_args": {"num_cpus": 2, "include_dashboard": False}}
    )
    assert (tmp_path / "model" / "model.json").is_file()
    assert len(json.loads((tmp_path / "model-report.json").read_text())["clients"]) == 2
