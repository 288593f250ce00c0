"""Flower as the transport: a ClientApp that answers, and a Grid that asks (message API; extra "federated")."""

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from ssl_exit.errors import InputError
from ssl_exit.federated.client import Client
from ssl_exit.federated.questions import Arrays, Ask

ASK = "query.ssl_exit"
ARRAYS, ABOUT = "arrays", "about"  # records of a message
KEPT = 16  # clients whose features a process keeps between messages


def client_app(make: Callable[[Context], Client]) -> ClientApp:
    """A ClientApp that answers what `fit_federated` asks.

    Args:
        make: the client of a node; called again where Flower has started another process for it.
    """
    app, clients = ClientApp(), OrderedDict[int, Client]()

    @app.query("ssl_exit")
    def answer(message: Message, context: Context) -> Message:
        try:
            if context.node_id not in clients:
                clients[context.node_id] = make(context)
            clients.move_to_end(context.node_id)
            while len(clients) > KEPT:
                clients.popitem(last=False)
            question = str(message.content[ABOUT]["question"])
            content = _packed(clients[context.node_id].answer(question, _arrays(message)), {})
        except (InputError, OSError) as error:
            content = _packed({}, {"error": f"{error}"})
        return Message(content, reply_to=message)

    return app


def flower_clients(grid: Grid, nodes: int = 1, timeout: float | None = 3600.0, wait: float = 60.0) -> Ask:
    """A transport to the nodes of a Flower federation.

    Args:
        grid: of the ServerApp.
        nodes: how many must be there before the first question.
        timeout: seconds for all answers to a question; what comes later counts as missing. None: no limit.
        wait: seconds to wait for the nodes.

    Raises:
        InputError: fewer nodes.
    """
    end = time.monotonic() + wait
    while len(there := sorted(grid.get_node_ids())) < nodes:
        if time.monotonic() > end:
            raise InputError(f"{len(there)} of {nodes} nodes came within {wait:.0f} s; start their SuperNodes, or wait")
        time.sleep(0.5)

    def ask(question: str, told: Arrays, wanted: list[int] | None) -> dict[int, Arrays | str]:
        content = _packed(told, {"question": question})
        messages = [Message(content, node, ASK) for node in (there if wanted is None else wanted)]
        answers: dict[int, Arrays | str] = {}
        for reply in grid.send_and_receive(messages, timeout=timeout):
            node = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    *_, reason = ["no reason given", *f"{reply.error.reason or ''}".splitlines()]
                    raise InputError(f"its app failed: {reason.strip()}")
                if "error" in reply.content[ABOUT]:
                    raise InputError(str(reply.content[ABOUT]["error"]))
                answers[node] = _arrays(reply)
            except InputError as error:
                answers[node] = f"{error}"
            except Exception as error:  # whatever bytes of a stranger lead a decoder to
                answers[node] = f"its answer cannot be read ({type(error).__name__}: {error})"
        return answers

    return ask


def _packed(arrays: Arrays, about: dict[str, str]) -> RecordDict:
    return RecordDict({ARRAYS: ArrayRecord({k: Array(v) for k, v in arrays.items()}), ABOUT: ConfigRecord({**about})})


def _arrays(message: Message) -> Arrays:
    """Arrays of a message; Flower reads them without pickle."""
    return {name: np.asarray(array.numpy()) for name, array in message.content.array_records[ARRAYS].items()}
