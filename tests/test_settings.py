"""Parameters are written once: refused by name where they are nonsense, and known to scikit-learn by nested names."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import ParameterGrid

from ssl_exit import Calibration, Clusters, ExitClusterer, Exits, Front, Rule, Runtime
from ssl_exit.errors import InputError
from ssl_exit.settings import GROUPS, Settings, help_texts, options_of


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exits(ensemble="no"), "ensemble must be True or False; got 'no'"),
        (lambda: Exits(3), r"points \(--exits\) must be a string or a list of names or a tuple of names; got 3"),
        (lambda: Exits("layer1"), 'exits must be "auto" or a list of names'),
        (lambda: Exits([1, 2]), r"points \(--exits\) must be"),
        (lambda: Exits(descriptor="nonsense"), "descriptor must be one of .*'auto', 'average'"),
        (lambda: Exits(patience=0), r"patience must be a whole number in \[1, 1000\]; got 0"),
        (lambda: Exits(patience=True), "patience must be a whole number"),
        (lambda: Runtime(compile="false"), "compile must be True or False; got 'false'"),
        (lambda: Runtime(num_workers=-1), r"num_workers must be a whole number in \[0, 1024\]"),
        (lambda: Rule(options=["hidden"]), r"options \(--rule_options\) must be a dictionary by name or None"),
        (lambda: Clusters(spherical=1), "spherical must be True or False; got 1"),
        (lambda: Calibration("most"), "guarantee must be one of .*'overall'"),
        (lambda: Calibration(audit=2), r"audit must be a number in \[0, 1\]; got 2"),
        (lambda: Calibration("expectation", audit=0.1), "expectation.*no audit can tell"),
        (lambda: Settings(n_clusters=2.5), r"n_clusters must be a whole number in \[1, inf\)"),
        (lambda: Settings(confidence=float("nan")), "confidence must be a number"),
    ],
)
def test_nonsense_is_refused_by_name_with_the_legal_values(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_constructor_takes_the_names_and_defaults_of_the_settings():
    signature = inspect.signature(ExitClusterer)
    assert len(signature.parameters) <= 14
    defaults = {f.name: getattr(Settings(), f.name) for f in fields(Settings)}
    own = {name: p.default for name, p in signature.parameters.items() if name not in ("encoder", "preprocessing")}
    assert own | {"front": Front.of(own["front"])} == defaults


def test_every_option_has_a_name_of_its_own_and_a_line_of_help():
    options = options_of(Settings)
    flags = [option.flag for option in options]
    assert len(set(flags)) == len(flags)
    assert all(len(option.help) > 10 for option in options)
    assert set(help_texts(Settings)) == {f.name for f in fields(Settings)}


def test_a_group_may_be_named_by_its_first_field():
    c = ExitClusterer(None, rule="mlp", exits=["layer1"], calibration="cluster")
    assert c.get_params()["rule__name"] == "mlp"
    assert c.settings().exits == Exits(["layer1"])
    assert c.settings().calibration.guarantee == "cluster"


def test_scikit_learn_reads_and_sets_nested_names():
    c = ExitClusterer(None, rule="mlp")
    c.set_params(rule__options={"hidden": 8}, exits__patience=2, n_clusters=3, runtime=Runtime(compile=True))
    assert c.rule == Rule("mlp", {"hidden": 8})
    c.set_params(rule=Rule("sdn"), rule__mirror=True)
    assert c.rule == Rule("sdn", mirror=True)
    copied = clone(c)
    assert copied is not c
    assert copied.get_params() == c.get_params()
    assert "n_clusters=3" in repr(c)
    grid = ParameterGrid({"rule__name": ["centroid", "mlp"], "calibration__cost": ["macs", "time"]})
    seen = {(each.rule.name, each.calibration.cost) for each in (clone(c).set_params(**p) for p in grid)}
    assert seen == {(rule, cost) for rule in ("centroid", "mlp") for cost in ("macs", "time")}
    c.set_params(calibration="expectation").set_params(calibration__audit=0.1, calibration__guarantee="overall")
    with pytest.raises(InputError, match="patience must be"):
        c.set_params(n_clusters=7, exits__patience=0)
    assert c.n_clusters == 3  # all or nothing
    with pytest.raises(InputError, match="has no parameter 'rulex'"):
        c.set_params(rulex="mlp")
    with pytest.raises(InputError, match="has no parameter 'rule__hidden'"):
        c.set_params(rule__hidden=3)
    with pytest.raises(InputError, match="patience must be"):
        c.set_params(exits__patience=0)


@given(
    k=st.integers(1, 1000),
    rule=st.sampled_from(["centroid", "mlp"]),
    audit=st.floats(0, 1, allow_subnormal=False),
    accumulate=st.booleans(),
    points=st.one_of(st.just("auto"), st.lists(st.text(max_size=5))),
)
def test_to_a_dictionary_and_back(k, rule, audit, accumulate, points):
    flat = {"n_clusters": k, "rule": rule, "audit": audit, "accumulate": accumulate, "exits": points}
    settings = Settings.from_flat(flat)
    assert Settings.from_dict(settings.to_dict()) == settings
    assert (settings.rule.name, settings.calibration.audit, settings.exits.accumulate) == (rule, audit, accumulate)


def test_numbers_of_numpy_are_numbers():
    assert Settings(n_clusters=np.int64(3), max_disagreement=np.float32(0.5)).n_clusters == 3


def test_saved_settings_of_another_version_are_refused():
    with pytest.raises(InputError, match="no settings of this version"):
        Settings.from_dict({"n_clusters": 3, "colour": "blue"})


def test_groups_are_named_as_their_fields():
    assert {name: type(getattr(Settings(), name)) for name in GROUPS} == GROUPS
