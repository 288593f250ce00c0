"""Asking clients: who answered what, in how many bytes, and who is left out."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ssl_exit.errors import InputError, printable
from ssl_exit.federated.client import Client
from ssl_exit.federated.questions import Arrays, Ask, Sizes, size_of


@dataclass
class ClientRow:
    """What a report says of a client.

    Attributes:
        client: its number in the transport.
        images: to fit, to shape thresholds, and to certify.
        n: of its images that certify, those that it gave counts of.
        disagreements: of those, how many get another label than the full encoder's; NaN without counts.
        bound: Clopper-Pearson upper bound on their share, at the confidence of the fit, for this client alone and for a
            setting fixed in advance.
        early: share of them that leaves early.
        bytes_up, bytes_down: arrays that it sent and was sent.
        left_out: why the server asked it no more, or "".
    """

    client: int
    images: tuple[int, int, int] = (0, 0, 0)
    n: int = 0
    disagreements: float = float("nan")
    bound: float = 1.0
    early: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    left_out: str = ""


@dataclass
class FederatedReport:
    """How a federated fit went.

    Attributes:
        clients: a row each.
        questions: of every question in turn its name, how many clients were asked and answered, bytes up and down,
            and seconds.
        guarantee: "mixture" or "client" (see `ssl_exit.exits.mixture`).
        cost, cost_untrimmed: mean cost of the certified setting over images that certify, and what it would be
            without trim.
        inertia: of the final clusters over all images to fit, at every Lloyd step.
    """

    clients: list[ClientRow] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    guarantee: str = "mixture"
    cost: float = 1.0
    cost_untrimmed: float = 1.0
    inertia: list[float] = field(default_factory=list)

    @property
    def bytes_up(self) -> int:
        return sum(row.bytes_up for row in self.clients)

    @property
    def bytes_down(self) -> int:
        return sum(row.bytes_down for row in self.clients)

    @property
    def worst(self) -> ClientRow | None:
        """The client with the largest share of disagreement; None where none gave counts."""
        counted = [row for row in self.clients if row.n]
        return max(counted, key=lambda row: row.disagreements / row.n, default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_up": self.bytes_up, "bytes_down": self.bytes_down}


class Tally:
    """Asks all clients that are left, checks what they answer, and counts bytes.

    Args:
        ask: the transport.
        fewest: share of the clients that must answer a question, in (0, 1].
        tries: how often a client that did not answer in time is asked again.
    """

    def __init__(self, ask: Ask, fewest: float, tries: int) -> None:
        self.ask, self.fewest, self.tries = ask, fewest, tries
        self.rows: dict[int, ClientRow] = {}
        self.report = FederatedReport()
        self.sizes: dict[int, Sizes] = {}

    def hello(self, about: Arrays) -> dict[int, Sizes]:
        """Who is there, and with how many images.

        Clients whose images have another shape than those of most are left out.

        Raises:
            InputError: too few.
        """
        answers = self.of_each("hello", about, lambda answer, _: Sizes.of(answer))
        self.sizes = {client: Sizes.of(answer) for client, answer in answers.items()}
        (shape, n), *_ = Counter(sizes.image for sizes in self.sizes.values()).most_common(1)
        if n < max(1, self.fewest * len(self.rows)) or 2 * n <= len(self.sizes):
            raise InputError(
                f"{n} of {len(self.rows)} clients have images of one shape, {shape}; the others have others"
            )
        for client, sizes in list(self.sizes.items()):
            self.rows[client].images = sizes.fit, sizes.shape, sizes.certify
            if sizes.image != shape:
                self._leave_out(client, "hello", f"its images have shape {sizes.image}, those of most {shape}")
        return self.sizes

    def of_each(self, question: str, told: Arrays, check: Callable[[Arrays, Sizes], Any]) -> dict[int, Arrays]:
        """Answers that passed a check, by client, in the order of their numbers.

        A client that answers with an error or with what cannot be is asked no more; one that does not answer in time,
        even when asked again, is missing from this answer only.

        Raises:
            InputError: fewer answers than must be.
        """
        first = question == "hello"
        waiting: list[int] | None = None if first else sorted(self.sizes)
        start, checked, up, down, n_asked = time.perf_counter(), dict[int, Arrays](), 0, 0, 0
        for _ in range(1 + self.tries):
            answers = self.ask(question, told, waiting)
            asked = sorted(answers) if waiting is None else waiting
            n_asked = max(n_asked, len(asked))
            for client in asked:
                self.rows.setdefault(client, ClientRow(client)).bytes_down += size_of(told)
                down += size_of(told)
            for client, answer in sorted(answers.items()):
                if client in checked or client not in asked:
                    continue
                try:
                    if isinstance(answer, str):
                        raise InputError(answer)
                    self.rows[client].bytes_up += size_of(answer)
                    up += size_of(answer)
                    check(answer, self.sizes.get(client, NONE))
                    checked[client] = answer
                except InputError as error:
                    self._leave_out(client, question, str(error))
            if first:
                break
            waiting = [client for client in waiting or [] if client in self.sizes and client not in checked]
            if not waiting:
                break
        total = len(self.rows)
        self.report.questions.append({"question": question, "asked": n_asked, "answered": len(checked), "bytes_up": up,
                                      "bytes_down": down, "seconds": time.perf_counter() - start})  # fmt: skip
        if len(checked) < max(1, self.fewest * total):
            reasons = {row.left_out for row in self.rows.values() if row.left_out}
            why = f": {next(iter(sorted(reasons)))}" if reasons else " in time"
            raise InputError(f"{len(checked)} of {total} clients answered {question!r}, fewer than must{why}")
        return dict(sorted(checked.items()))

    def _leave_out(self, client: int, question: str, reason: str) -> None:
        self.sizes.pop(client, None)
        self.rows[client].left_out = f"{question}: {reason}"
        warnings.warn(f"client {client} is left out, {question}: {printable(reason)}", stacklevel=4)

    def finished(self) -> FederatedReport:
        self.report.clients = [self.rows[client] for client in sorted(self.rows)]
        return self.report


NONE = Sizes(0, 0, 0, 0, (0, 0, 0), False)


def local_clients(clients: Mapping[int, Client]) -> Ask:
    """A transport to clients in this process, which answer one after the other."""

    def ask(question: str, told: Arrays, wanted: list[int] | None) -> dict[int, Arrays | str]:
        answers: dict[int, Arrays | str] = {}
        for client in clients if wanted is None else wanted:
            try:
                answers[client] = clients[client].answer(question, told)
            except InputError as error:
                answers[client] = str(error)
        return answers

    return ask
