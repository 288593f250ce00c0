"""Every parameter, written once: name, type, legal values, default, and a line of help.

The constructor of `ExitClusterer` takes these names, `fit` checks them here, models save them, and the options and
`--help` of the command line and docs/parameters.md are made from them. Nothing slow is imported.
"""

from ssl_exit.settings.clustering import (
    GROUPS,
    Calibration,
    Clusters,
    Exits,
    Front,
    Guarantee,
    Rule,
    Runtime,
    Settings,
)
from ssl_exit.settings.groups import Group, Option, help_texts, option, options_of
from ssl_exit.settings.training import Method, Optimization, TrainingRun

__all__ = ["GROUPS", "Calibration", "Clusters", "Exits", "Front", "Group", "Guarantee", "Method", "Optimization",
           "Option", "Rule", "Runtime", "Settings", "TrainingRun", "help_texts", "option", "options_of"]  # fmt: skip
