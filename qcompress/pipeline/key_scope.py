"""The scope of each stage's cache key: the one table of everything that can re-run a stage. No torch.

    stage   recipe values                        data          inputs               device
    ------  -----------------------------------  ------------  -------------------  -----------------
    load    model.family, model.blocks, the                    the checkpoint's
            head (labels), the image processor                 files
    train   seed, task, format, data.train,      train,        load                 kind, threads,
            data.calibration, train, the five    calibration                        processes
            axes; not format.preset,
            task.stride, slices,
            train.device,
            train.checkpoint_every_s;
            train without options that
            no phase reads
            (`effective_train`)
    fold                                                       load, train          kind, threads
    export  export, build.target, provenance     export.graph  fold (load: for an   kind, threads
                                                               external graph)
    build   build                                              export               machine, GPU
    verify  task, data.evaluate, verify,         evaluate      load, train, fold,   kind, threads,
            format.compute,                                    export, build        GPU
            quantizer.activations; not
            verify.require
    gate    gate, verify.require,                              verify
            format.compute, build.target

Code of a stage: every module of this package that it imports, inside functions too, except

  * the modules in `NO_RESULT`, which print, log or store files, and do not affect a result;
  * the imports in `ONLY_CHECKED`, with which the schema checks sections that the stage does not read;
  * the imports in `ONLY_MEASURED`, which the tasks need for the metrics of verify;
  * in the three tables `methods`, `models` and `tasks`, the entries that the recipe does not select
    (`unselected`). A module counts nevertheless if anything but the table imports it.

Versions of a stage: the installed packages of `TOOLS`. `name`, `tracking` and the folders of files are in no
key. `tests/pipeline/test_key_scope.py` tests both directions.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from qcompress.schema.axes import PHASES
from qcompress.schema.custom import active
from qcompress.schema.rates import peak_rates
from qcompress.schema.recipe import STAGES, Recipe

VALUES: dict[str, tuple[str, ...]] = {
    "load": ("model.family", "model.blocks"),
    "train": (
        "seed", "task", "format", "data.train", "data.calibration", "train",
        "quantizer", "adapter", "objective", "stepper", "schedule",
    ),
    "fold": (),
    "export": ("export", "build.target"),
    "build": ("build",),
    "verify": ("task", "data.evaluate", "verify", "format.compute", "quantizer.activations"),
    "gate": ("gate", "verify.require", "format.compute", "build.target"),
}  # fmt: skip
"""Sections and keys of the recipe that affect a stage's result. `keys.py` adds values derived from a recipe
and a checkpoint: the head, the image processor, provenance, and whether the recipe trains in float.
"""

NOT_VALUES: dict[str, tuple[str, ...]] = {
    "train": (
        "format.preset",  # its formats are in the key
        "train.device",  # the kind of device is in the key
        "train.checkpoint_every_s",  # a resumed run equals an uninterrupted one bit for bit
        "task.score",
        "task.error",
        "task.stride",  # of evaluation windows; training sequences do not overlap
        "data.train.slices",  # slices divide evaluation sets only
        "data.calibration.slices",
    ),
    "verify": ("verify.require",),  # read by gate
}
"""Exceptions from VALUES."""

INPUTS: dict[str, tuple[str, ...]] = {
    "load": (),
    "train": ("load",),
    "fold": ("load", "train"),
    "export": ("fold",),
    "build": ("export",),
    "verify": ("load", "train", "fold", "export", "build"),
    "gate": ("verify",),
}
"""Stages whose artifacts a stage reads."""

HIDDEN_CODE: dict[str, tuple[str, ...]] = {
    "build": ("qcompress.engine.build_engine",),
    "verify": (
        "qcompress.engine.probe_kit.measure_engine",
        "qcompress.engine.probe_kit.engine_runners",
        "qcompress.engine.probe_kit.engine_speed",
    ),
}
"""Code that a stage starts as a process or copies, without importing it."""

NO_RESULT: dict[str, str] = {
    "qcompress": "the version number, and the API, which is imported on demand",
    "qcompress.system.reporter": "bars and lines for the terminal and log.jsonl, which no stage reads",
    "qcompress.training.history": "records of updates, and the choice of recorded updates",
    "qcompress.system.filesystem": "folders, disk errors, memory statistics",
    "qcompress.system.locks": "one writer of a cache entry at a time",
    "qcompress.system.fingerprint": "names of cache entries: another name is another entry",
    "qcompress.schema.custom_code": "names of cache entries, for custom classes",
    "qcompress.training.movement": "a line for the terminal about learned scales, after the last update",
}
"""Modules in no key, and the reason why they do not affect a result."""

NOT_CAUGHT = ("load", "train", "fold", "export")
"""Stages that catch none of this package's errors: an error leaves no result, so that `errors.py` (classes,
exit codes) does not affect one. build, verify and gate record the errors of other steps.
"""

ONLY_CHECKED: dict[str, tuple[tuple[str, str], ...]] = {
    stage: (
        ("qcompress.schema.recipe", "qcompress.schema.goals"),
        ("qcompress.schema.recipe", "qcompress.schema.export"),
    )
    for stage in ("load", "train", "fold")
} | {
    stage: (("qcompress.schema.recipe", "qcompress.schema.goals"),) for stage in ("export", "build", "verify")
}  # fmt: skip
"""Imports, as (importer, imported), of section classes with values that the stage never reads: `gate` for all
stages but gate, `export` and `build` for the stages before export. verify imports `goals` itself for the
default limits, so it counts there.
"""

ONLY_MEASURED: tuple[tuple[str, str], ...] = (
    ("qcompress.tasks.sequence_classification", "qcompress.tasks.scores"),
    ("qcompress.tasks.token_classification", "qcompress.tasks.scores"),
    ("qcompress.tasks.image_classification", "qcompress.tasks.scores"),
    ("qcompress.tasks.feature_extraction", "qcompress.tasks.scores"),
    ("qcompress.tasks.question_answering", "qcompress.tasks.scores"),
    ("qcompress.tasks.image_classification", "qcompress.tasks.image_slices"),
)
"""Imports that compute the results of an evaluation set, which the stages before verify do not have."""

NOT_BUILT: tuple[tuple[str, str], ...] = (
    ("qcompress.encodings.base", "qcompress.quant.layers"),
    ("qcompress.encodings.int_qdq", "qcompress.quant.affine"),
    ("qcompress.encodings.int_qdq", "qcompress.quant.folded"),
    ("qcompress.encodings.int_qdq", "qcompress.quant.folded_conv"),
    ("qcompress.encodings.codebook", "qcompress.quant.folded_codebook"),
    ("qcompress.encodings.codebook", "qcompress.encodings.lookup_nodes"),
)
"""Imports by which encodings fold, decode and export a weight. build only finds weights in a graph."""

METHOD_MODULES: dict[str, dict[str, str]] = {
    "adapter": {"quadapter": "quadapter", "smoothquant": "smoothquant", "awq": "awq"},
    "objective": {"distillation": "distillation", "teacher-intervention": "teacher_intervention"},
    "stepper": {"saq": "saq", "squat": "squat"},
    "schedule": {
        "blockwise-then-end-to-end": "quadapter",
        "two-step": "teacher_intervention",
        "staged": "ipq",
    },
}
"""Modules of `training.methods` that implement only some values of an axis; `plain` implements the others."""

TOOLS: dict[str, tuple[str, ...]] = {
    "load": (),
    "train": ("torch", "transformers", "accelerate", "numpy"),
    "fold": ("torch", "transformers"),
    "export": ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"),
    "build": ("tensorrt", "tensorrt_rtx"),
    "verify": (
        "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "numpy", "scikit-learn", "scipy",
        "tensorrt", "tensorrt_rtx",
    ),
    "gate": (),
}  # fmt: skip
"""Packages whose version can change a stage's result."""

READERS = {"image-classification": "pillow", "any": "numpy"}
"""Package that reads a task's data, in train and verify; `tokenizers` for all other tasks."""

BY_MODELOPT = ("smoothquant", "awq")
"""Adapters whose scales nvidia-modelopt computes."""


def unselected(recipe: Recipe, stage: str) -> set[tuple[str, str]]:
    """Imports, as (importer, imported), whose code the stage does not run for this recipe: entries of the
    tables of methods, families and tasks that the recipe does not select, and `ONLY_CHECKED`.
    """
    from qcompress.models import FAMILIES
    from qcompress.tasks import TASKS

    selected = {METHOD_MODULES[axis].get(getattr(recipe, axis).name, "plain") for axis in METHOD_MODULES}
    methods = {module for modules in METHOD_MODULES.values() for module in modules.values()}
    edges = {
        ("qcompress.training.methods", f"qcompress.training.methods.{name}") for name in methods - selected
    }
    tables = (("models", FAMILIES, recipe.model.family), ("tasks", TASKS, recipe.task.name))
    for package, table, name in tables:
        others = {module.__name__ for key, module in table.items() if key != name}
        edges |= {(f"qcompress.{package}", module) for module in others}
    measured = ONLY_MEASURED if stage in STAGES[: STAGES.index("verify")] else ()
    built = NOT_BUILT if stage == "build" else ()
    return edges | set(ONLY_CHECKED.get(stage, ())) | set(measured) | set(built)


def scope_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Dump the recipe's values without those that the stage ignores."""
    values = recipe.model_dump(mode="json", by_alias=True)
    if stage == "train":
        values["train"] = effective_train(recipe)
    for dotted in NOT_VALUES.get(stage, ()):
        *above, last = dotted.split(".")
        section = values
        for key in above:
            section = section.get(key) or {}
        section.pop(last, None)
    return values


def effective_train(recipe: Recipe) -> dict[str, Any]:
    """Dump `train` without options that no phase reads.

    * Steps and learning rates are resolved: a default that is written out equals the default. A phase has
      rates of the roles that it trains, and none if it makes no update.
    * `decay` and `warmup` count if a phase makes an update, `weight_decay` and `layer_drop` if it trains
      weights, `momentum` under SGD alone.
    * `optimizer` counts if a phase makes an update. Otherwise it only selects how a learned scale is stored,
      as a product with exactly 1 either way; a custom class may store it differently.
    """
    train, phases = recipe.train, {}
    for name, defaults in PHASES[recipe.schedule.name].items():
        steps = train.phases[name].steps if name in train.phases else defaults.steps
        peaks = peak_rates(train, name)
        phases[name] = {"steps": steps, "lr": {role: peaks[role] for role in defaults.roles if steps}}
    roles = {role for phase in phases.values() for role in phase["lr"]}
    counts = {
        "decay": bool(roles),
        "warmup": bool(roles),
        "weight_decay": "weight" in roles,
        "layer_drop": "weight" in roles,
        "momentum": bool(roles) and train.optimizer == "sgd",
        "optimizer": bool(roles) or bool(active().used(recipe)),
    }
    values = train.model_dump(mode="json", exclude={"lr", "phases"})
    return {key: value for key, value in values.items() if counts.get(key, True)} | {"phases": phases}


def no_result(stage: str) -> set[str]:
    """Modules that do not affect the stage's result."""
    return {*NO_RESULT, *(("qcompress.errors",) if stage in NOT_CAUGHT else ())}


def versions_of(stage: str, recipe: Recipe) -> dict[str, str]:
    """Installed versions of the stage's tools."""
    packages = list(TOOLS[stage])
    if stage in ("train", "verify"):
        packages.append(READERS.get(recipe.task.name, "tokenizers"))
    form = recipe.format
    exceptions = [one.weights for one in form.layers.values() if one.weights != "inherit"]
    weights = [weight for weight in (form.weights, form.embeddings, *exceptions) if weight is not None]
    if stage == "train" and recipe.adapter.name in BY_MODELOPT:
        packages.append("nvidia-modelopt")
    if stage == "train":
        packages += sorted({package for weight in weights for package in weight.packages})
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
