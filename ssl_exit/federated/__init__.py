"""Fit where the images are: clients answer questions about their own images, a server adds the answers up."""

from ssl_exit.federated.client import Client
from ssl_exit.federated.partition import dirichlet_split
from ssl_exit.federated.server import Federation, fit_federated
from ssl_exit.federated.tally import ClientRow, FederatedReport, local_clients

__all__ = ["Client", "ClientRow", "FederatedReport", "Federation", "dirichlet_split", "fit_federated",
           "local_clients"]  # fmt: skip
