"""Defaults of `ExitClusterer` as values: in its source they stand as those of `Settings`. mkdocs runs this file."""

from typing import Any

import griffe

from ssl_exit.settings import Settings
from ssl_exit.settings.groups import Group

PREFIX = "_DEFAULT."


class Defaults(griffe.Extension):
    """`_DEFAULT.n_clusters` -> `10`; a group -> its name, as `Exits()`."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if str(attr.value).startswith(PREFIX):
            value = getattr(Settings(), str(attr.value).removeprefix(PREFIX))
            attr.value = f"{type(value).__name__}()" if isinstance(value, Group) else repr(value)
