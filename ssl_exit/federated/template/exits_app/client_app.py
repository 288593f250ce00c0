"""A client: answers about its own images."""

from flwr.app import Context

from ssl_exit.federated import Client
from ssl_exit.federated.flower import client_app

from .task import clusterer, images


def client(context: Context) -> Client:
    return Client(clusterer(context.run_config), images(context), rows=context.run_config["thresholds"] == "rows")


app = client_app(client)
