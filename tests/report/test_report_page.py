"""report.html of a run: its figures against the JSON, what it may not load, what it must not believe."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lines import finished
from pages import Node, Page, look_up, read, same
from scipy import stats

from qcompress import api
from qcompress.errors import IncomparableError, UsageError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; $\\frac{a$ {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def run(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(finished(tiny_model, text_file).latest, folder)
    return folder


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(run, tmp_path / "mine")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return read(api.report([run]))


def change(file: Path, edit: Any) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def rows_of(table: Node) -> list[list[str]]:
    return [[cell.text.strip() for cell in row.children] for row in table.all("tr")]


# Figures ------------------------------------------------------------------------------------------


def test_every_figure_is_the_number_that_its_file_has(page: Page, run: Path) -> None:
    pointed = [node.attributes for node in page.figures if "data-from" in node.attributes]
    assert len(pointed) > 150
    for figure in pointed:
        value, wanted = json.loads(figure["data-value"]), look_up(figure["data-from"], [run])
        if "data-over" in figure and wanted is not None:
            wanted /= look_up(figure["data-over"], [run])
        assert same(value, wanted), figure


def test_what_is_shown_is_that_number(page: Page) -> None:
    """Five digits of it, two of a share or three of a loss; in the unit that stands beside it."""
    seen = set()
    for node in page.figures:
        value, shown = json.loads(node.attributes["data-value"]), node.text.strip()
        if value is None or isinstance(value, bool):
            assert shown == {None: "-", True: "yes", False: "no"}[value]
            continue
        number, _, unit = shown.replace(",", "").partition(" ")
        seen.add(unit)
        of_bytes = "bytes" in node.attributes.get("data-from", "")
        size = {"KiB": 1024, "MiB": 2**20 if of_bytes else 1}
        assert float(number) * size.get(unit, 1) == pytest.approx(value, rel=0.051, abs=1e-12), shown
        if "data-from" in node.attributes and "data-over" not in node.attributes:
            assert float(number) * size.get(unit, 1) == pytest.approx(value, rel=6e-4, abs=1e-12), shown
    assert seen == {"", "KiB", "MiB", "s"}


def test_the_page_has_every_metric_goal_layer_and_stage(page: Page, run: Path) -> None:
    shown = {node.attributes.get("data-from") for node in page.figures}
    parity, verdict, sizes, manifest = (
        json.loads((run / f"{name}.json").read_text()) for name in ("parity", "verdict", "sizes", "manifest")
    )
    wanted = {
        f"parity.json#/rows/{place}/metrics/{name}"
        for place, row in enumerate(parity["rows"])
        for name in row.get("metrics") or {}
    }
    wanted |= {
        f"parity.json#/rows/{place}/distance/snr_db"
        for place, row in enumerate(parity["rows"])
        if row.get("distance")
    }
    wanted |= {f"verdict.json#/goals/{place}/value" for place in range(len(verdict["goals"]))}
    wanted |= {f"sizes.json#/layers/{place}/bytes" for place in range(len(sizes["layers"]))}
    wanted |= {f"manifest.json#/stages/{name}/seconds" for name in manifest["stages"]}
    assert len(wanted) == 40
    assert wanted <= shown


def test_the_kernels_of_the_layers_are_counted_and_listed(page: Page, run: Path) -> None:
    answer = json.loads((run / "sizes.json").read_text())["kernels"]["onnxruntime"]
    counts = f"{answer['integer']} of {answer['products']} quantized layers run as integer kernels"
    assert answer["products"] == 9 and counts in page.section("ladder").text
    listed = page.section("layers").text
    assert "Kernels in ONNX Runtime" in listed and "why not on integers" in listed
    shown = {cell.attributes.get("data-from") for cell in page.section("layers").all("data")}
    pointer = "sizes.json#/kernels/onnxruntime/layers/{}/decoded_bytes"
    assert {pointer.format(place) for place in range(len(answer["layers"]))} <= shown


def test_rows_that_were_not_measured_say_why(page: Page, run: Path) -> None:
    engine = json.loads((run / "parity.json").read_text())["rows"][-1]
    assert engine["status"] == "not-run"
    for anchor in ("verdict", "ladder"):
        assert engine["reason"] in page.section(anchor).text


def test_recovery_is_the_paired_loss_in_percent_with_its_bootstrap_interval(page: Page, run: Path) -> None:
    rows = {row["stage"]: row for row in json.loads((run / "parity.json").read_text())["rows"]}
    sets = json.loads(gzip.decompress((run / "samples.json.gz").read_bytes()))["sets"]
    (table,) = [item for item in page.section("recovery").children if item.tag == "div"]
    body = table.all("tr")[1:]
    assert [line.children[0].text.strip() for line in body] == ["test.perplexity", "other.perplexity"]
    for line, name in zip(body, ("test", "other"), strict=True):
        reference, value, loss, low, high = (
            json.loads(cell.attributes["data-value"]) for cell in line.all("data")
        )
        assert reference == rows["float"]["metrics"][f"{name}.perplexity"]
        assert value == rows["onnx"]["metrics"][f"{name}.perplexity"]
        assert loss == pytest.approx(100 * (value - reference) / reference, rel=1e-6)
        nll = [np.array(sets[name]["rows"][stage]["nll"]) for stage in ("float", "onnx")]
        tokens = np.array(sets[name]["tokens"])
        draws = np.random.default_rng(3).integers(len(tokens), size=(20_000, len(tokens)))
        before, after = (np.exp(item[draws].sum(1) / tokens[draws].sum(1)) for item in nll)
        wanted = np.quantile(100 * (after / before - 1), [0.05, 0.95])
        few = stats.t.ppf(0.95, len(tokens) - 1) / stats.norm.ppf(0.95)  # 1.3 for five samples
        wanted = loss + few * (wanted - loss)
        # the page's is wider by sqrt(n / (n - 1)): 12 % for five samples
        assert [low, high] == pytest.approx(wanted, abs=0.2 * (wanted[1] - wanted[0]))


def test_goals_against_a_baseline_stand_there_with_their_intervals(mine: Path, run: Path, page: Page) -> None:
    goals = mine / "goals.yaml"
    goals.write_text("gate: {regression: {test.perplexity: {percent-max-degradation: 1}}}\n")
    judgement = api.gate_against(run, mine, goals=goals)
    baseline = read(api.report([mine])).section("baseline")
    assert "accept against" in baseline.text and "baseline" not in {
        node.attributes["id"] for node in page.all("section")
    }
    line = next(row for row in rows_of(baseline) if row[0] == "test.perplexity")
    assert judgement["goals"][0]["interval"] == [0.0, 0.0]
    assert line[1:3] == ["percent-max-degradation", "1"] and line[-1] == "pass"
    pointers = {node.attributes.get("data-from") for node in baseline.all("data")}
    assert {f"gate.json#/goals/0/{key}" for key in ("value", "loss", "interval/0", "interval/1")} <= pointers


# What a page may not do ---------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    assert not re.search(
        r"https?:|//[a-z]|@import|<script|<iframe|<object|<embed", page.source, re.IGNORECASE
    )
    ids = [node.attributes["id"] for node in page.nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids)) > 20
    links = 0
    for node in page.nodes:
        assert not {name for name in node.attributes if name.startswith("on")}
        assert not {"src", "srcset", "action", "poster", "background"} & node.attributes.keys()
        href = node.attributes.get("href")
        if href is not None and href != "data:,":
            links += 1
            assert href[0] == "#" and href[1:] in ids, href
    for place in re.findall(r"url\(([^)]*)\)", page.source):
        assert place[0] == "#" and place[1:] in ids
    assert links > 10


def test_names_and_reasons_are_text_whatever_they_say(mine: Path) -> None:
    def layer(content: dict[str, Any]) -> None:
        content["layers"][0]["name"] = HOSTILE

    def reasons(content: dict[str, Any]) -> None:
        content["reasons"] = [HOSTILE]
        content["goals"][0]["metric"] = HOSTILE

    def reason(content: dict[str, Any]) -> None:
        content["rows"][-1]["reason"] = HOSTILE
        content["rows"][0]["metrics"][f"test.{HOSTILE}"] = 1.0

    def host(content: dict[str, Any]) -> None:
        content["host"]["name"] = content["versions"]["torch"] = HOSTILE

    for name, edit in {"sizes": layer, "certificate": layer, "verdict": reasons, "parity": reason,
                       "manifest": host}.items():  # fmt: skip
        change(mine / f"{name}.json", edit)
    with (mine / "recipe.resolved.yaml").open("a") as stream:
        stream.write(f"\n# {HOSTILE}\n")
    page = read(api.report([mine]))
    assert not page.all("script") and not page.all("img")
    for anchor in ("verdict", "ladder", "layers", "certificate", "manifest"):
        assert "<script>alert(1)</script>" in page.section(anchor).text, anchor
    assert HOSTILE in page.section("manifest").text
    assert all(same(json.loads(node.attributes["data-value"]), look_up(node.attributes["data-from"], [mine]))
               for node in page.figures if "data-from" in node.attributes
               and "data-over" not in node.attributes)  # fmt: skip


# What may be missing ------------------------------------------------------------------------------

MISSING = {
    "sizes.json": {"layers": "sizes.json", "sizes": "sizes.json is missing"},
    "certificate.json": {"certificate": "certificate.json is missing"},
    "samples.json.gz": {"recovery": "samples.json.gz is missing"},
    "engine/build.json": {"sizes": "engine/build.json is missing"},
    "log.jsonl": {"training": "no loss curve"},
    "lint.json": {},
    "distributions.json": {"distributions": "distributions.json is missing"},
}


@pytest.mark.parametrize("name", MISSING)
def test_a_file_that_is_missing_is_said_to_be(name: str, mine: Path, page: Page) -> None:
    (mine / name).unlink()
    content = read(api.report([mine]))
    assert [node.attributes["id"] for node in content.all("section")] == [
        node.attributes["id"] for node in page.all("section")
    ]
    for anchor, sentence in MISSING[name].items():
        assert sentence in content.section(anchor).text


@pytest.mark.parametrize("name", ["parity.json", "verdict.json", "manifest.json", "recipe.resolved.yaml"])
def test_a_run_without_its_result_is_refused(name: str, mine: Path) -> None:
    (mine / name).unlink()
    with pytest.raises(UsageError, match=rf"not a finished run: {name} is missing"):
        api.report([mine])


def test_a_damaged_file_is_named(mine: Path) -> None:
    (mine / "sizes.json").write_text('{"layers": [')
    with pytest.raises(IncomparableError, match=r"sizes\.json is torn"):
        api.report([mine])


def test_numbers_that_are_none_are_shown_and_not_drawn(mine: Path) -> None:
    def broken(content: dict[str, Any]) -> None:
        content["rows"][3]["metrics"]["test.perplexity"] = float("nan")
        content["rows"][2]["metrics"]["test.perplexity"] = float("inf")

    change(mine / "parity.json", broken)
    page = read(api.report([mine]))
    values = {node.attributes.get("data-from"): node.text.strip() for node in page.figures}
    assert values["parity.json#/rows/3/metrics/test.perplexity"] == "nan"
    assert values["parity.json#/rows/2/metrics/test.perplexity"] == "inf"
    assert "the per-sample results do not give it" in page.section("recovery").text


# Training -----------------------------------------------------------------------------------------


def logged(mine: Path, *records: dict[str, Any]) -> Page:
    text = "".join(json.dumps({"time": 1.0, **record}) + "\n" for record in records)
    (mine / "log.jsonl").write_text(text + '{"event": "sa')  # a killed run
    return read(api.report([mine]))


def update(number: int, step: int, loss: float, **more: Any) -> dict[str, Any]:
    facts = {"phase": ("calibrate", "finetune")[number], "steps": 60, "update": 60 * number + step}
    return {"event": "update", "number": number, "step": step, "loss": loss, **facts, **more}


def scales(step: int, **found: Any) -> dict[str, Any]:
    return {"event": "scales", "number": 0, "phase": "calibrate", "step": step, "update": step,
            "scales": found}  # fmt: skip


def test_a_silent_run_has_curves_of_its_losses_and_scales(page: Page, run: Path) -> None:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    updates = [place for place, record in enumerate(records) if record["event"] == "update"]
    pointers = [node.attributes.get("data-from") for node in page.section("training").all("data")]
    assert len(updates) == 120
    assert {f"log.jsonl#/{place}/loss" for place in updates} <= set(pointers)
    titles = [svg.all("title")[0].text for svg in page.section("training").all("svg")]
    assert titles == ["Loss by update of each phase", "Learned scales that moved the most"]


def test_curves_are_the_records_in_the_order_of_their_updates(mine: Path) -> None:
    records = logged(
        mine,
        update(1, 30, 2.5, terms={"logits": 2.0, "hidden": 0.5}, lr={"weight": 1e-3}),
        update(1, 1, 3.5, terms={"logits": 3.0, "hidden": 0.5}, lr={"weight": 2e-3}),
        {"event": "say", "text": "finetune: 30/60  loss 9.5"},
        update(0, 1, 0.25, lr={"adapter": 0.1}),
        update(0, 60, 0.125, lr={"adapter": 0.2}),
    ).section("training")
    losses, terms = (chart.all("table")[0] for chart in records.all("figure"))
    assert rows_of(losses)[1:] == [
        ["calibrate", "1", "0.25", "0.1", "-"], ["calibrate", "60", "0.125", "0.2", "-"],
        ["finetune", "1", "3.5", "-", "0.002"], ["finetune", "30", "2.5", "-", "0.001"],
    ]  # fmt: skip
    assert rows_of(terms)[1:] == [["finetune", "61", "3", "0.5"], ["finetune", "90", "2", "0.5"]]
    told = [node.text for node in records.all("desc")]
    assert told == ["calibrate: 1 0.25, 60 0.125. finetune: 1 3.5, 30 2.5.",
                    "logits: 61 3, 90 2. hidden: 61 0.5, 90 0.5."]  # fmt: skip


def test_the_scales_that_moved_most_are_drawn_and_the_others_listed(mine: Path) -> None:
    first = {f"still.{place}": 1.0 + place for place in range(300)}
    records = logged(
        mine,
        scales(0, **first, **{"a/b.input": 0.5, "c.weight": [0.1, 0.2, 0.3]}),
        scales(30, **{"a/b.input": 0.4}),
        scales(60, **first, **{"a/b.input": 0.25, "c.weight": [0.1, 0.8, 0.3]}),
        scales(60, once=2.0),
    )
    training = records.section("training")
    (chart,) = training.all("figure")
    told = chart.all("desc")[0].text
    assert told.startswith("c.weight, median: 0 0.2, 60 0.8. a/b.input: 0 0.5, 30 0.4, 60 0.25. still.0: ")
    assert told.count("still") == 4 and "302 learned scales" in training.text
    rows = rows_of(chart.all("table")[0])
    assert rows[1:3] == [["c.weight", "median", "0.2", "0.8", "4"], ["a/b.input", "", "0.5", "0.25", "0.5"]]
    assert len(rows) == 201
    assert "The 102 that are not in the table moved by a factor of 1 at most" in training.text
    pointed = [node.attributes for node in records.figures if "log.j" in node.attributes.get("data-from", "")]
    assert len(pointed) == 400
    for figure in pointed:
        assert json.loads(figure["data-value"]) == look_up(figure["data-from"], [mine])


def test_what_was_not_logged_is_left_out_and_said(mine: Path) -> None:
    training = logged(mine, update(0, 60, 3.2), scales(60, alone=1.0)).section("training")
    assert "no loss curve" in training.text and not training.all("figure")
    assert "no learned scale" in training.text


# Before and after ---------------------------------------------------------------------------------


def test_histograms_are_those_of_the_file_bin_by_bin(page: Page, run: Path) -> None:
    document = json.loads((run / "distributions.json").read_text())
    channels, weights = page.section("distributions").all("figure")
    for chart, entries, named, keys in (
        (channels, document["channels"], "site", ("before", "after")),
        (weights, document["histograms"], "layer", ("float", "deployed")),
    ):
        assert len(entries) == 4 and len(chart.all("svg")) == 1
        wanted = [
            [entry[named], *(json.dumps(value) for value in (*entry["edges"][at : at + 2],
                                                              *(entry[key][at] for key in keys)))]
            for entry in entries
            for at in range(len(entry["edges"]) - 1)
        ]  # fmt: skip
        rows = [
            [row.all("th")[0].text.strip(), *(cell.attributes["data-value"] for cell in row.all("data"))]
            for row in chart.all("table")[0].all("tr")[1:]
        ]
        assert rows == wanted and len(rows) > 90
        for key in keys:
            assert str(sum(entries[0][key])) in chart.all("desc")[0].text
    assert "mathdefault" not in page.source


def test_sites_and_layers_stand_in_tables_the_worst_first(page: Page, run: Path) -> None:
    document = json.loads((run / "distributions.json").read_text())
    tables = {
        table.all("caption")[0].text: rows_of(table) for table in page.section("distributions").all("table")
    }
    sites = tables["Sites of the adapter"]
    ratio = {site["site"]: site["before"]["largest"] / site["before"]["median"] for site in document["sites"]}
    assert [row[0] for row in sites[1:]] == sorted(ratio, key=lambda name: -ratio[name])
    snr = {entry["layer"]: entry["snr_db"] for entry in document["weights"]}
    assert [row[0] for row in tables["SNR of the weights"][1:]] == sorted(snr, key=snr.__getitem__)


def test_a_run_without_adapter_has_no_channels(mine: Path) -> None:
    change(mine / "distributions.json", lambda content: content.update(sites=[], channels=[]))
    section = read(api.report([mine])).section("distributions")
    assert len(section.all("figure")) == 1 and "magnitude" not in section.text
    change(mine / "distributions.json", lambda content: content.update(weights=[], histograms=[]))
    section = read(api.report([mine])).section("distributions")
    assert "No weight is quantized" in section.text and not section.all("figure")


# Charts -------------------------------------------------------------------------------------------


def test_every_chart_has_a_text_and_its_figures_as_a_table(page: Page) -> None:
    charts = page.all("figure")
    assert len(charts) == 9
    for chart in charts:
        (svg,) = chart.all("svg")
        assert svg.attributes["role"] == "img"
        told = [chart.all(tag)[0] for tag in ("title", "desc")]
        assert svg.attributes["aria-labelledby"].split() == [node.attributes["id"] for node in told]
        assert all(len(node.text) > 10 for node in told[1:]) and told[0].text
        (details,) = chart.all("details")
        assert len(details.all("tr")) > 2 and details.all("data")


def test_a_chart_has_the_colours_of_the_page_and_no_other(page: Page) -> None:
    styles = [
        node.attributes["style"]
        for node in page.nodes
        if "svg" in node.parents and "style" in node.attributes
    ]
    assert len(styles) > 100
    for style in styles:
        assert not re.search(r"#[0-9a-f]{3,8}\b(?!\))", style.replace("url(#", "url(")), style
    assert {f"var(--series-{number})" for number in (1, 2)} <= set(
        re.findall(r"var\([\w-]+\)", "".join(styles))
    )
    fonts = [style for style in styles if "font" in style]
    assert len(fonts) > 50 and all("var(--font)" in style and "DejaVu" not in style for style in fonts)
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_the_distances_of_layers_are_drawn_where_there_are_any(mine: Path, page: Page) -> None:
    assert "No distances by layer" in page.section("layers").text
    far = {
        "max_abs": 0.1,
        "mean_abs": 0.01,
        "range": 4.0,
        "cosine": 1.0,
        "snr_db": 51.5,
        "top1_agreement": None,
    }
    layer = {"name": "h.0", "folded_to_trained": None, "onnx_to_folded": far, "codes": 100, "differ": 3,
             "ties": 2, "farthest": 0.1, "unexplained": 1}  # fmt: skip
    plain = {**layer, "name": "h.1", "codes": None, "differ": None, "ties": None}
    content = {"layers": [layer, plain], "first_difference": "h.0", "first_unexplained": "h.0",
               "unexplained": 1, "windows": 4, "tie_limit": 0.001}  # fmt: skip
    (mine / "layers.json").write_text(json.dumps(content))
    layers = read(api.report([mine])).section("layers")
    assert "no rounding explains 1 of them, first at the input of h.0" in layers.text
    (line,) = [row for row in rows_of(layers.all("figure")[1].all("table")[0]) if row[0] == "h.0"]
    assert line == ["h.0", "0.025", "51.5", "100", "3", "2"]
    assert "SNR, dB: h.0 51.5" in layers.all("desc")[1].text
    (mine / "sizes.json").unlink()
    layers = read(api.report([mine])).section("layers")
    assert "sizes.json is missing, so no bits." in layers.text and len(layers.all("figure")) == 1


@pytest.mark.slow
def test_a_page_stays_below_five_megabytes_with_a_thousand_layers(mine: Path) -> None:
    for name in ("sizes", "certificate"):
        change(mine / f"{name}.json", lambda content: content.update(layers=content["layers"][:1] * 1000))
    change(mine / "distributions.json", lambda content: content.update(weights=content["weights"][:1] * 1000))
    assert api.report([mine]).stat().st_size < 5e6
    assert api.report([mine]).read_text().count("sizes.json#/layers/999/bytes") == 1
