"""A client: answers about its own images."""

from typing import Any

from flwr.app import Context

from ssl_exit.federated import Client
from ssl_exit.federated.flower import client_app

from .task import clusterer, images


def client(context: Context) -> Client:
    config: Any = context.run_config
    own: Any = {"rows": config["thresholds"] == "rows", "least": config["least"]} | dict(context.node_config)
    return Client(clusterer(config), images(context), rows=own["rows"], least=own["least"])


app = client_app(client)
