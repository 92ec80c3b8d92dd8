"""Registry: names in order, doubles and unknown names refused, parts imported when used."""

from __future__ import annotations

import pytest

from molora.errors import ConfigError
from molora.registry import Lazy, Registry


def colours() -> Registry[int]:
    registry: Registry[int] = Registry("colour")
    for name, value in (("red", 1), ("green", 2)):
        registry.add(name, value)
    return registry


def test_parts_keep_their_order_and_are_found_by_name():
    registry = colours()
    assert list(registry) == ["red", "green"] and registry["green"] == 2 and len(registry) == 2
    assert "blue" not in registry and registry.get("blue") is None


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"colour 'gren' is not one of red, green\. Did you mean 'green'\?"):
        colours()["gren"]


def test_a_name_is_given_once_and_says_by_whom():
    registry = colours()
    registry.add("blue", 3, source="a_package.colours")
    with pytest.raises(ConfigError, match=r"there is a colour 'blue' already \(of a_package.colours\)"):
        registry.add("blue", 4)
    registry.remove("blue")
    registry.add("blue", 4)
    assert registry["blue"] == 4


def test_names_obey_the_one_rule():
    with pytest.raises(ConfigError, match="colour name"):
        colours().add("../red", 3)


def test_a_lazy_part_is_imported_when_it_is_used():
    registry: Registry[object] = Registry("thing")
    registry.add("check", Lazy("config.names:check_name"))
    registry.add("lost", Lazy("config.names:nothing_here"))
    from molora.config.names import check_name

    assert "check" in registry and registry["check"] is check_name
    with pytest.raises(AttributeError):
        registry["lost"]
