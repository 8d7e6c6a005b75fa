"""Jobs and tables of a study that nobody runs: parts of files, digests, what a script prepares, sizes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_study import STUDY, Machinery, machinery, write_study

from qcompress.errors import UsageError
from qcompress.recipe.load import examine
from qcompress.system.reporter import Reporter


@pytest.fixture(scope="module")
def tools() -> Iterator[Machinery]:
    with machinery() as found:
        yield found


@pytest.mark.parametrize("header", [False, True])
def test_rows_of_a_table_are_held_out_at_random_and_none_is_lost(
    tools: Machinery, tmp_path: Path, header: bool
) -> None:
    lines = [f"{index}\tsentence {index}\n".encode() for index in range(100)]
    head = [b"\xef\xbb\xbfQuality\tString\n"] if header else []
    (tmp_path / "train.tsv").write_bytes(b"".join([*head, *lines]))
    task = tools.study.TaskOptions(train="train.tsv", test="dev.tsv", header=header)
    files = tools.jobs.split_data("task", task, tools.jobs.Place(tmp_path, tmp_path, tmp_path / "work"))
    parts = [files[name].read_bytes().splitlines(keepends=True) for name in ("train", "holdout")]
    for part in parts:
        assert part[: len(head)] == head
        assert part[len(head) :] == sorted(part[len(head) :], key=lambda line: int(line.split(b"\t")[0]))
    train, held = (part[len(head) :] for part in parts)
    assert len(held) == 10 and sorted(train + held) == sorted(lines)
    assert held != lines[-10:] and files["test"] == tmp_path / "dev.tsv"


def test_rows_of_an_archive_are_held_out_at_random_and_stay_together(
    tools: Machinery, tmp_path: Path
) -> None:
    images, labels = np.arange(40 * 12, dtype=np.uint8).reshape(40, 2, 2, 3), np.arange(40)
    np.savez(tmp_path / "all.npz", x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3])
    columns = {
        "train": {"image": "x_train", "label": "y_train"}, "test": {"image": "x_test", "label": "y_test"}
    }  # fmt: skip
    task = tools.study.TaskOptions(train="all.npz", test="all.npz", key="npz", columns=columns)
    place = tools.jobs.Place(tmp_path, tmp_path, tmp_path / "work")
    files = tools.jobs.split_data("images", task, place)
    found = {}
    for part, count in (("train", 36), ("holdout", 4)):
        with np.load(files[part]) as archive:
            assert set(archive.files) == {"x_train", "y_train"} and len(archive["y_train"]) == count
            assert np.array_equal(archive["x_train"], images[archive["y_train"]])
            found[part] = archive["y_train"].tolist()
    assert sorted(found["train"] + found["holdout"]) == labels.tolist()
    assert found["holdout"] != labels[-4:].tolist() and files["test"] == tmp_path / "all.npz"
    written = [files[part].stat().st_mtime_ns for part in ("train", "holdout")]
    assert tools.jobs.split_data("images", task, place) == files
    assert [files[part].stat().st_mtime_ns for part in ("train", "holdout")] == written
    with pytest.raises(ValueError, match="columns"):
        tools.study.TaskOptions(train="all.npz", test="all.npz", key="npz")


@pytest.mark.parametrize("name", ["test", "holdout"])
def test_no_other_set_takes_the_name_of_the_tasks_own(tools: Machinery, name: str) -> None:
    with pytest.raises(ValueError, match="the task's own"):
        tools.study.TaskOptions(train="a.txt", test="b.txt", key="text", others={name: "c.txt"})


def two_sets(folder: Path, tools: Machinery, tiny_model: Path, text_file: Path) -> tuple[Any, Any]:
    """A study whose final runs are measured on a second text, and where it is."""
    task = STUDY["tasks"]["letters"] | {
        "others": {"more": "{study}/more.txt"}, "start": {"train.lr.weight": 0.125}
    }  # fmt: skip
    write_study(folder / "letters", tools, tasks={"letters": task})
    shutil.copytree(tiny_model, folder / "model")
    text = text_file.read_text()
    for name, part in (("train.txt", text[:4000]), ("test.txt", text[4000:6000])):
        (folder / name).write_text(part)
    (folder / "letters" / "more.txt").write_text(text[6000:8000])
    place = tools.jobs.Place(folder / "letters", folder, folder / "work")
    return tools.study.read_study(place.folder), place


def test_more_sets_are_measured_by_final_runs_alone_and_belong_to_their_digest(
    tools: Machinery, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    study, place = two_sets(tmp_path, tools, tiny_model, text_file)
    (tmp_path / "float").mkdir()

    def jobs() -> list[Any]:
        start = tools.jobs.start_job(study, "letters", place), tmp_path / "float"
        chosen = study.arms["lsq"].trials[0]
        final = tools.jobs.arm_job(study, "lsq", "letters", 0, place, start, chosen)
        return [
            start[0],
            final,
            tools.jobs.arm_job(study, "lsq", "letters", 0, place, start, chosen, trial=0),
        ]

    recipes = [examine(job.recipe, job.overrides)[1] for job in jobs()]
    assert [list(recipe.data.evaluate) for recipe in recipes] == [["test", "more"]] * 2 + [["holdout"]]
    assert recipes[1].data.evaluate["more"].text == [str(place.folder / "more.txt")]
    assert [recipe.train.lr.get("weight") for recipe in recipes] == [0.125, 1e-5, 1e-5]
    before = [job.digest for job in jobs()]
    (place.folder / "more.txt").write_text("another text")
    after = [job.digest for job in jobs()]
    assert after[:2] != before[:2] and after[0] != before[0] and after[1] != before[1]


def test_what_a_study_prepares_is_made_once_for_a_script_and_a_failure_ends_it(
    tools: Machinery, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    study, place = two_sets(tmp_path, tools, tiny_model, text_file)
    script = place.folder / "make.py"
    place.work.mkdir()
    study = study.model_copy(update={"prepare": "make.py"})
    runner = tools.run.Runner(study, place, "*", False, Reporter(silent=True))
    script.write_text("raise SystemExit(3)")
    with pytest.raises(UsageError, match="make.py failed"):
        runner.prepare()
    assert not place.made.exists()
    script.write_text(
        "import sys, pathlib, time\n(pathlib.Path(sys.argv[1]) / 'x').write_text(str(time.time_ns()))"
    )
    runner.prepare()
    first = (place.made / "x").read_text()
    runner.prepare()
    assert (place.made / "x").read_text() == first
    script.write_text(script.read_text() + "  # another script")
    runner.prepare()
    assert (place.made / "x").read_text() != first


def fake_result(arm: str, seed: int, scores: dict[str, float], size: int | None) -> dict[str, Any]:
    """A result of a language model of two samples a set, as far as a table reads it."""
    samples = {
        name: {"ids": ["0", "1"], "tokens": [4, 4], "inputs": name,
               "results": {"nll": [4 * math.log(score)] * 2, "correct": [1, 1]}}
        for name, score in scores.items()
    }  # fmt: skip
    metrics = {f"{name}.perplexity": score for name, score in scores.items()}
    return {
        "arm": arm, "task": "letters", "seed": seed, "recipe_sha256": arm, "verdict": "accept",
        "rows": {"float": dict.fromkeys(metrics, 2.0), "onnx": metrics},
        **({} if size is None else {"onnx_bytes": size}),
        "cost": {"updates": 10, "block_updates": 0, "passes": 10, "seconds": 20.0},
        "machine": {"cpu": "x", "processor": "x", "threads": 1, "gpu": {"sm": []}}, "versions": {},
        "start": "s", "main": dict.fromkeys(scores, "perplexity"), "sets": list(scores),
        "settings": {"arm": arm}, "samples": samples,
    }  # fmt: skip


def test_a_table_shows_sizes_and_the_set_that_it_is_about(tools: Machinery) -> None:
    tables = {
        "in domain": {"arms": ["lsq", "lsq-long"], "baseline": "lsq"},
        "out of domain": {"arms": ["lsq", "lsq-long"], "baseline": "lsq", "metric": "more.perplexity"},
    }
    study = tools.study.Study.model_validate({**STUDY, "tables": tables})
    results = [
        fake_result(arm, seed, {"test": 3.0 + seed, "more": 7.0 + seed + (arm == "lsq-long")}, size)
        for arm, size in (("lsq", 2**20), ("lsq-long", 3 * 2**19))
        for seed in (0, 1)
    ]
    text, _ = tools.table.generate(study, results)
    inside, outside = text.split("### out of domain")
    assert "| arm | letters (perplexity) | seeds | MiB | updates | passes | seconds |" in inside
    assert "| float | 2 |  |  |  |  |  |" in inside
    assert "| lsq | 3.5 ± 0.71 | 2 | 1 | 10 | 10 | 20 |" in inside
    assert "| lsq-long | 8.5 ± 0.71 | 2 | 1.5 | 10 | 10 | 20 |" in outside
    assert "| lsq-long | 2 | +1 |" in outside
    without = [{key: value for key, value in item.items() if key != "onnx_bytes"} for item in results]
    assert "MiB" not in tools.table.generate(study, without)[0]
