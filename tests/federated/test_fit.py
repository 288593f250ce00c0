"""A fit over clients is that of all their images; what clients may say is checked."""

import json

import numpy as np
import pytest
import torch

from ssl_exit import InputError, load
from ssl_exit.data.hashes import image_hashes
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.exits.certificate import SettingCounts, certify
from ssl_exit.federated import Client, Federation, dirichlet_split, fit_federated, local_clients
from ssl_exit.fitting.calibrate import leaving_costs
from ssl_exit.fitting.fit_shard import CERTIFY, FIT, SHAPE, fit_shard, roles_of
from ssl_exit.fitting.record import record
from ssl_exit.fitting.shards import Shard
from tests.conftest import clusterer

HOW = {
    "n_clusters": 4,
    "max_disagreement": 0.1,
    "confidence": 0.9,
    "exits": ["block2", "block5"],
    "descriptor": "average",
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return digits_encoder().eval()


@pytest.fixture(scope="module")
def parts(digits):
    """Images of four clients, each bright, dark or between."""
    return digits[digits.flatten(1).sum(1).argsort(stable=True)].tensor_split([200, 800, 900])


@pytest.fixture(scope="module")
def asked(encoder, parts):
    """What four clients answer, computed once."""
    return local_clients(made(encoder, parts))


def made(encoder, parts, rows=True, **how):
    return {i + 10: Client(clusterer(encoder, **HOW | how), part, rows=rows) for i, part in enumerate(parts)}


def fitted(encoder, ask, how=None, **options):
    c = clusterer(encoder, **HOW | options)
    return c, fit_federated(c, ask, how or Federation())


def changed(ask, client, **questions):
    """A transport in which one client answers some questions otherwise."""

    def other(question, told, wanted):
        answers = ask(question, told, wanted)
        if client in answers and question in questions:
            answers[client] = questions[question]({**answers[client]})
        return answers

    return other


def test_with_known_centroids_it_is_the_fit_of_all_images_in_one_process(encoder, digits, parts):
    """Statistics, temperatures and rows of clients come to what `fit_shard` makes of all images at once."""
    centroids = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)
    c = clusterer(encoder, **HOW).set_params(n_clusters=centroids)
    ask = local_clients({i + 10: Client(c, part, rows=True) for i, part in enumerate(parts)})
    report = fit_federated(c, ask, Federation(thresholds="rows"))
    one = fit_shard(encoder, open_source(digits), Shard(), c.settings())
    assert c.model_.provenance.n_fit == one.provenance.n_fit
    for own, other in zip(c.model_.cascade.rules, one.cascade.rules, strict=True):
        torch.testing.assert_close(own.weight, other.weight, rtol=1e-2, atol=1e-3)
        assert float(own.temperature) == pytest.approx(float(other.temperature), rel=2e-2)
    labels = c.predict(digits)
    mine = one.run(open_source(digits).batches(np.arange(len(digits)), 256), len(digits)).labels
    assert (labels == mine).mean() > 0.995
    assert abs(c.certificate_.n - one.certificate.n) <= 3  # copies at two clients count twice
    assert {row.client for row in report.clients} == {10, 11, 12, 13}


def open_source(images):
    from ssl_exit.data.images import open_images

    return open_images(images)


def test_any_order_and_numbering_of_the_clients_gives_the_same_model(encoder, parts, asked, digits):
    first, _ = fitted(encoder, asked)
    clients = made(encoder, [parts[i] for i in (2, 0, 3, 1)])
    second, _ = fitted(encoder, local_clients(dict(reversed(clients.items()))))
    np.testing.assert_array_equal(first.predict(digits), second.predict(digits))
    assert first.certificate_.to_dict() | {"issued_for": 0} == second.certificate_.to_dict() | {"issued_for": 0}


def test_what_an_image_is_for_follows_from_its_content(encoder, parts):
    clients, settings = made(encoder, parts), clusterer(encoder, **HOW).settings()
    for client, part in zip(clients.values(), parts, strict=True):
        told = client.answer("hello", {"about": client.shared.about})
        roles = roles_of(image_hashes(part), settings)
        assert int(told["fit"]) == (roles == FIT).sum()
        for name, role in (("shape", SHAPE), ("certify", CERTIFY)):
            assert int(told[name]) == len(np.unique(image_hashes(part)[roles == role]))
        np.testing.assert_array_equal(np.sort(client._survey.keys), np.sort(image_hashes(part)[roles == FIT]))


def test_k_means_over_clients_is_nearly_that_of_all_images(encoder, digits, asked):
    c, report = fitted(encoder, asked)
    pooled = clusterer(encoder, **HOW).fit(digits)
    assert (np.diff(report.inertia) <= 1e-6 * report.inertia[0]).all()
    features = torch.from_numpy(pooled.embed(digits))
    own = c.model_.cascade.final.squared_distances(features).min(1).values.sum()
    best = pooled.model_.cascade.final.squared_distances(features).min(1).values.sum()
    assert own < 1.02 * best
    assert report.bytes_up == sum(q["bytes_up"] for q in report.questions) > 0
    assert report.worst.disagreements / report.worst.n >= c.certificate_.disagreements / c.certificate_.n
    assert sum(row.n for row in report.clients) == c.certificate_.n
    assert "over the images of all clients" in str(c.certificate_)


def test_agreement_holds_on_images_that_no_client_had(encoder, digits):
    train, test = digits[:1400], digits[1400:]
    targets = train.flatten(1).sum(1).argsort().argsort().numpy() * 4 // len(train)
    ask = local_clients(made(encoder, [train[part] for part in dirichlet_split(targets, 5, 0.3)]))
    c, _ = fitted(encoder, ask)
    e = c.evaluate(test)
    assert e.cost_macs < 0.9
    assert e.agreement > 0.85


def test_placing_by_counts_leaves_out_what_does_not_pay(encoder, parts):
    how = {"exits": "auto"}
    c, report = fitted(encoder, local_clients(made(encoder, parts, **how)), **how)
    assert "trials" in [q["question"] for q in report.questions]
    choices = c.exit_choices_
    assert len(choices) > len(c.exit_points_) >= 1
    assert [choice.name for choice in choices if choice.kept] == [point.name for point in c.exit_points_]


def test_the_model_is_saved_and_calibrated_at_a_client(encoder, parts, asked, tmp_path):
    c, report = fitted(encoder, asked)
    c.save(tmp_path / "model")
    again = load(tmp_path / "model", encoder)
    np.testing.assert_array_equal(again.predict(parts[1]), c.predict(parts[1]))
    assert not again.certificate_.void
    assert again.certificate_.guarantee == "mixture"
    json.dumps(report.to_dict())


def test_every_client_or_nothing(encoder, asked):
    c, report = fitted(encoder, asked, Federation(guarantee="client"), max_disagreement=0.1)
    assert report.guarantee == "client"
    delta = 0.1 / 4
    from scipy.special import bdtr

    if c.certificate_.early:
        assert all(bdtr(row.disagreements, row.n, 0.1) <= delta for row in report.clients)
    assert "at every client" in str(c.certificate_)


@pytest.mark.parametrize("thresholds", ["counts", "rows"])
def test_a_client_certifies_the_model_for_itself(encoder, parts, thresholds):
    """On the federated path, by its own counts; images it was fitted to cannot certify it again."""
    clients = made(encoder, parts)
    c, report = fitted(encoder, local_clients(clients), Federation(thresholds=thresholds))
    before = c.certificate_
    for client, row in zip(clients.values(), report.clients, strict=True):
        own = client.calibrated(c)
        told = certify(c.model_.path, counts_of(client, c), costs_of(c), 0.1, 0.9)
        assert own.certificate_.guarantee == "overall"
        assert (own.certificate_.n, own.certificate_.disagreements) == (told[1].n, told[1].disagreements)
        assert own.certificate_.n == row.n
        np.testing.assert_array_equal(own.model_.cascade.thresholds, c.model_.path[told[0]])
        assert not own.certificate_.void
    assert c.certificate_ == before
    with pytest.raises(InputError, match="were used in fit"):
        own.calibrate(parts[-1])
    for other in (own, clusterer(encoder, **HOW)):
        with pytest.raises(InputError, match="as fit_federated left it"):
            client.calibrated(other)
    other, _ = fitted(encoder, local_clients(made(encoder, parts, seed=1)), seed=1)
    with pytest.raises(InputError, match="of another fit than this client: random_state"):
        client.calibrated(other)


def counts_of(client, c):
    roles = client._survey.roles
    recorded, _ = record(c.model_.cascade, client.source.batches(np.flatnonzero(roles == CERTIFY), 64))
    return SettingCounts.count(c.model_.path, recorded)


def costs_of(c):
    return leaving_costs(c.model_.cascade, "macs", range(len(c.exit_points_)))


WRONG = {
    "nan": {"lloyd": lambda a: a | {"sums": a["sums"] * np.nan}},
    "long sums": {"lloyd": lambda a: a | {"sums": a["sums"] + 1000.0}},
    "negative counts": {"lloyd": lambda a: a | {"counts": a["counts"] - 1}},
    "more images than it has": {"statistics": lambda a: a | {"counts_0": a["counts_0"] + 5}},
    "impossible scatter": {"statistics": lambda a: a | {"scatter_0": -a["scatter_0"]}},
    "other names": {"statistics": lambda a: {"x": a["counts_0"]}},
    "other shape": {"start": lambda a: a | {"centroids": a["centroids"][:, :5]}},
    "other type": {"start": lambda a: a | {"centroids": a["centroids"].astype(np.float64)}},
    "losses": {"losses": lambda a: a | {"losses": a["losses"] + 1e9}},
    "more wrong than there are": {"counts": lambda a: a | {"wrong": a["wrong"].astype(np.int64) + 1000}},
    "text": {"counts": lambda a: a | {"wrong": np.array(["x"])}},
    "it failed": {"counts": lambda a: "its disk is full"},
    "huge": {"start": lambda a: a | {"centroids": a["centroids"] * np.float32(1e20)}},
    "huge descriptors": {"start": lambda a: a | {"descriptors": a["descriptors"] + 1e200}},
    "counts that overflow": {"lloyd": lambda a: a | {"counts": np.full(4, 2**62)}},
    "cells that overflow": {"counts": lambda a: a | {"left": a["left"].astype(np.int64) + 2**62}},
    "no image": {"hello": lambda a: a | {"image": np.array([1, 10**6, 8])}},
    "no numbers": {"hello": lambda a: a | {"fit": np.array(-3)}},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_client_that_answers_what_cannot_be_is_left_out(encoder, asked, what):
    with pytest.warns(UserWarning, match="client 11 is left out"):
        c, report = fitted(encoder, changed(asked, 11, **WRONG[what]))
    (row,) = [row for row in report.clients if row.left_out]
    assert row.client == 11
    assert row.left_out.startswith(next(iter(WRONG[what])))
    assert c.certificate_.n == sum(row.n for row in report.clients if row.client != 11)


def test_rows_that_cannot_be(encoder, asked):
    for wrong in ({"labels": np.full((1, 2), 9)}, {"scores": np.full((1, 2), 1.5, np.float32)}):
        ask = changed(asked, 11, rows=lambda a, wrong=wrong: {k: wrong.get(k, v[:1]) for k, v in a.items()})
        with pytest.warns(UserWarning, match="labels lie beyond 0 to 3, or scores"):
            fitted(encoder, ask, Federation(thresholds="rows"))


def test_clients_that_come_late_or_never(encoder, asked):
    calls = []

    def late(question, told, wanted):
        calls.append((question, wanted))
        answers = asked(question, told, wanted)
        if question == "lloyd" and len([c for c in calls if c[0] == "lloyd"]) == 1:
            del answers[12]  # comes when asked again
        if question in ("statistics", "losses"):
            answers.pop(13, None)  # is away for a while
        return answers

    c, report = fitted(encoder, late)
    assert ("lloyd", [12]) in calls
    assert ("statistics", [13]) in calls
    assert not any(row.left_out for row in report.clients)
    answered = {q["question"]: q["answered"] for q in report.questions}
    assert (answered["lloyd"], answered["statistics"], answered["counts"]) == (4, 3, 4)
    assert c.model_.provenance.n_fit == sum(row.images[0] for row in report.clients if row.client != 13)

    def gone(question, told, wanted):
        return {} if question == "counts" else asked(question, told, wanted)

    held = c.model_
    with pytest.raises(InputError, match="0 of 4 clients answered 'counts', fewer than must in time"):
        fit_federated(c, gone, Federation(tries=0))
    assert c.model_ is held


def test_clients_of_another_fit(encoder, parts, asked):
    odd = made(encoder, parts[:1], n_clusters=5) | {11: made(encoder, parts)[11]}
    with pytest.warns(
        UserWarning, match="client 10 is left out, hello: this client has other parameters .*: n_clusters"
    ):
        fitted(encoder, local_clients(odd))
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(InputError, match=r"0 of 4 clients answered 'hello'.*other parameters"),
    ):
        fitted(encoder, asked, n_clusters=7)
    shapes = made(encoder, [parts[0], torch.rand(50, 1, 12, 12)])
    with pytest.raises(InputError, match=r"1 of 2 clients have images of one shape"):
        fitted(encoder, local_clients(shapes))
    shapes |= {12: made(encoder, parts)[12]}
    with pytest.warns(UserWarning, match=r"client 11 is left out, hello: its images have shape \(1, 12, 12\)"):
        fitted(encoder, local_clients(shapes))


def test_a_client_with_fewer_images_than_clusters_takes_part(encoder, parts):
    clients = made(encoder, [parts[0], parts[1], parts[2][:3]])
    c, report = fitted(encoder, local_clients(clients))
    assert not any(row.left_out for row in report.clients)
    assert c.model_.provenance.n_fit == sum(row.images[0] for row in report.clients)


@pytest.mark.parametrize("thresholds", ["counts", "rows"])
def test_without_an_image_that_shapes_all_exits_stay(encoder, parts, thresholds):
    clients = made(encoder, parts[:2], exits="auto")
    for client in clients.values():
        client._survey.roles[client._survey.roles == SHAPE] = -1
    c, _ = fitted(encoder, local_clients(clients), Federation(thresholds=thresholds), exits="auto")
    assert c.exit_choices_ == []
    assert c.certificate_.n > 0


def test_small_clusters_are_not_told_of(encoder, digits):
    """No sum of fewer images than `least` leaves a client; what is left is counted consistently."""
    parts = digits[:600].tensor_split([40, 300])
    clients = {i: Client(clusterer(encoder, **HOW), part, least=12) for i, part in enumerate(parts)}
    hidden, told_of = 0, []

    def watched(question, told, wanted):
        nonlocal hidden
        answers = local_clients(clients)(question, told, wanted)
        for client, answer in answers.items():
            for name in ("counts", "counts_0"):
                if name in answer and question != "counts":
                    assert ((answer[name] == 0) | (answer[name] >= 12)).all()
                    hidden += int((clients[client]._survey.roles == FIT).sum() - answer[name].sum())
            if question == "statistics":
                told_of.append(answer["counts_0"].sum())
        return answers

    c, _ = fitted(encoder, watched)
    assert hidden > 0
    assert c.model_.provenance.n_fit == sum(told_of)
    assert (c.predict(digits[600:]) >= 0).all()
    with pytest.raises(InputError, match=r"clients tell of 0 clusters of their own|tell of 0 images"):
        fitted(encoder, local_clients({0: Client(clusterer(encoder, **HOW), parts[0], least=100)}))
    with pytest.raises(InputError, match="least is a number of images"):
        Client(clusterer(encoder, **HOW), parts[0], least=0)


def test_rows_leave_only_clients_that_allow_it(encoder, parts):
    clients = made(encoder, parts[:2]) | {12: made(encoder, parts, rows=False)[12]}
    with pytest.raises(InputError, match="some clients answer with counts alone"):
        fitted(encoder, local_clients(clients), Federation(thresholds="rows"))
    with pytest.raises(InputError, match="answers with counts alone, not with rows"):
        clients[12].answer("rows", {})
    with pytest.raises(InputError, match="there is no question 'images'"):
        clients[12].answer("images", {})
    with pytest.raises(InputError, match="question 'statistics' came without 'origin'"):
        clients[12].answer("statistics", {"centroids": np.zeros((4, 128), np.float32)})


def test_a_liar_within_bounds_is_held_by_trimmed_means(encoder, digits, parts):
    """One of seven clients turns its sums round: without trim the rules break, with it they do not."""
    sevenths = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))].tensor_split(7)
    ask = local_clients(made(encoder, sevenths))

    def turned(a):
        return a | {"sums_0": -20 * a["sums_0"], "scatter_0": 500 * a["scatter_0"]}

    honest, _ = fitted(encoder, ask)
    costs = {}
    for trim in (0.0, 0.1):
        c, report = fitted(encoder, changed(ask, 12, statistics=turned), Federation(trim=trim))
        costs[trim] = c.certificate_.cost
        assert report.cost <= report.cost_untrimmed or trim
    assert costs[0.1] < costs[0.0]
    assert costs[0.1] < honest.certificate_.cost + 0.3


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (
            {"rule": "mlp"},
            r"learn from sums alone, \['centroid', 'e2cm_released', 'euclidean', 'mahalanobis'\]; got 'mlp'",
        ),
        ({"front": "auto"}, "without a front"),
        ({"n_clusters": "auto"}, "without n_clusters='auto'"),
        ({"guarantee": "exit"}, "without guarantee='exit'"),
        ({"thresholds": "cbt"}, "without thresholds='cbt'"),
        ({"mirror": True}, "without mirror"),
    ],
)
def test_what_a_federated_fit_does_without(encoder, parts, option, why):
    with pytest.raises(InputError, match=why):
        Client(clusterer(encoder, **HOW | option), parts[0])


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": -1}, {"trim": 0.5}, {"fewest": 0}, {"thresholds": "none"}, {"guarantee": "all"}, {"settings": 1}],
)
def test_a_federation_that_cannot_be(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} of a Federation cannot be"):
        Federation(**wrong)


@pytest.mark.parametrize("rule", ["euclidean", "mahalanobis"])
def test_the_other_rules_of_sums(encoder, digits, parts, rule):
    how = {"rule": rule, "exits": ["block2"]}
    c, _ = fitted(encoder, local_clients(made(encoder, parts, **how)), **how)
    assert (c.predict(digits) >= 0).all()


def test_supervised_clients(encoder, digits):
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(encoder, nn.Linear(128, 4)).eval()
    how = {"supervised": True, "exits": ["0.block2"]}
    c, report = fitted(network, local_clients(made(network, digits.tensor_split(2), **how)), **how)
    assert report.inertia == []
    assert c.certificate_.n > 100
