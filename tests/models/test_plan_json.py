"""Sites and layers in the JSON of trained.json and folded.json."""

from __future__ import annotations

import json

import pytest

from qcompress.models.architecture import Layer, Site
from qcompress.models.plan import LayerPlan, plans_from_json, plans_to_json, site_from_json, site_to_json

SITES = [
    Site("norm", ("q", "k"), 8),
    Site("value", ("out",), 4, "value", first=8, point="value_point"),
    Site("qkv", ("out",), 2, "value", outputs=(2, 5), maps=((0, 0, 1, 1),)),
    Site("norm", ("a", "b"), 2, maps=(None, (-1, 1, 0))),
    Site("norm", ("a",), 2, maps=(None,)),
]


@pytest.mark.parametrize("site", SITES, ids=range(len(SITES)))
def test_a_site_survives_its_json(site: Site) -> None:
    back = site_from_json(json.loads(json.dumps(site_to_json(site))))
    assert back.channels == 0
    for key in ("writer", "readers", "kind", "first", "point", "outputs"):
        assert getattr(back, key) == getattr(site, key)
    assert [index for index in back.maps if index] == [index for index in site.maps if index]


def test_sites_without_channel_lists_keep_their_json() -> None:
    assert site_to_json(SITES[0]) == {"norm": "norm", "readers": ["q", "k"]}
    assert site_to_json(SITES[4]) == {"norm": "norm", "readers": ["a"]}
    assert site_to_json(SITES[1]) == {
        "value": "value",
        "readers": ["out"],
        "first": 8,
        "point": "value_point",
    }


def test_only_a_turned_layer_writes_its_axis() -> None:
    plan = (
        LayerPlan(Layer("a", "linear", 4, 8), None, None),
        LayerPlan(Layer("b", "linear", 4, 8, axis=1), None, None),
    )
    values = json.loads(json.dumps(plans_to_json(plan)))
    assert [value["layer"].get("axis") for value in values] == [None, 1]
    assert [item.layer.axis for item in plans_from_json(values)] == [0, 1]
