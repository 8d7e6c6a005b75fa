"""A child process that builds one engine: `python -m qcompress.engine.build_engine SPEC.json`.

TensorRT's parser and builder are native code that can crash on a file of unknown origin; the parent reads the
messages that this process wrote before. One process, one engine, one logger (TensorRT ignores a second one).

SPEC.json   {"onnx", "plan": paths, "backend", "sm", "versions": [[from, to]...], "memory_mib",
            "profiles": [{input: [min, opt, max shape]}...], "version_compatible", "hardware_compatibility",
            "timing_cache": path or null}
stdout      one JSON object on each line:
            {"event": "start", "version"}               TensorRT is loaded
            {"event": "progress", "phase", "fraction"}  0 to 1, never falling
            {"event": "message", "severity", "text"}    warnings and errors of TensorRT
            {"event": "unavailable", "reason"}          this machine cannot build for the target
            {"event": "refused", "stage", "errors": [{"node", "op", "text"}]}
            {"event": "unwritten", "errno", "file"}     the engine is built, but cannot be written to disk
            {"event": "done", "inputs", "outputs": {name: {"shape", "type"}},
             "timing_cache": {"read", "written": bytes} or null}
            The last line is one of the last four, unless the process crashed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from qcompress.system.memory import limit_memory


@dataclass(frozen=True)
class Backend:
    """Differences between TensorRT and TensorRT-RTX that concern a build."""

    module: str
    cross: bool
    """True if it builds for a given compute capability; otherwise it builds for the GPU of this machine."""


BACKENDS = {
    "tensorrt": Backend("tensorrt", cross=False),
    "tensorrt_rtx": Backend("tensorrt_rtx", cross=True),
}


class Channel:
    """Writes event lines to the parent on a duplicate of stdout; native code's output to stdout goes to
    stderr.
    """

    def __init__(self) -> None:
        self._stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, event: str, **values: object) -> None:
        """Write one event and flush: the next call of native code may crash."""
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._stream.flush()


@dataclass
class _Phase:
    parent: str | None
    steps: int
    finished: int = 0
    inside: float = 0.0
    """Fraction of the current step that a nested phase has finished."""

    @property
    def share(self) -> float:
        return min((self.finished + self.inside) / max(self.steps, 1), 1.0)


class Phases:
    """Progress of a build, from TensorRT's phases: each has steps, and a nested phase is one step of its
    parent.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self.fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Start a phase, nested in `parent` if given."""
        self._phases[name] = _Phase(parent if parent != name else None, steps)

    def step(self, name: str, index: int) -> None:
        """Finish a step, and update every enclosing phase. `fraction` never falls."""
        phase = self._phases.setdefault(name, _Phase(None, index + 1))
        phase.finished, phase.inside = index + 1, 0.0
        for _ in self._phases:
            around = self._phases.get(phase.parent or "")
            if around is None:
                break
            around.inside, phase = phase.share, around
        self.fraction = max(self.fraction, phase.share)


def main(arguments: list[str]) -> int:
    """Build the engine of the specification. Returns 0; the last line gives the result."""
    channel = Channel()
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        event, values = _run(spec, channel)
    except MemoryError:
        event, values = "refused", {"stage": "build", "errors": [_error("out of memory")]}
    channel.say(event, **values)
    return 0


def _error(text: str, node: str = "", op: str = "") -> dict[str, str]:
    return {"node": node, "op": op, "text": text}


def _run(spec: dict[str, Any], channel: Channel) -> tuple[str, dict[str, Any]]:
    """Run the build; returns the last event."""
    backend = BACKENDS[spec["backend"]]
    try:
        trt = importlib.import_module(backend.module)
    except (ImportError, OSError, RuntimeError) as error:  # no package, no libraries, no driver
        return "unavailable", {"reason": f"{backend.module} cannot be imported ({error})"}
    version = trt.__version__
    ranges = [[_numbers(end) for end in ends] for ends in spec["versions"]]
    if not any(low <= _numbers(version) < high for low, high in ranges):
        return "unavailable", {"reason": f"{backend.module} {version} does not build for this target"}
    channel.say("start", version=version)
    limit_memory(spec["memory_mib"])
    return _build(trt, backend, spec, channel)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _logger(trt: ModuleType, channel: Channel, errors: list[str]) -> Any:
    """Logger that forwards TensorRT's messages as events and collects the texts of errors."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                channel.say("message", severity=severity.name.lower(), text=msg)
            if severity.name in ("INTERNAL_ERROR", "ERROR"):
                errors.append(msg)

    return Logger()


def _monitor(trt: ModuleType, channel: Channel) -> Any:
    """Monitor that forwards TensorRT's progress as events, one for each percent."""
    phases = Phases()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.reported = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            if phases.fraction >= self.reported + 0.01:
                self.reported = phases.fraction
                channel.say("progress", phase=phase_name, fraction=round(phases.fraction, 3))
            return True

    return Monitor()


def _build(
    trt: ModuleType, backend: Backend, spec: dict[str, Any], channel: Channel
) -> tuple[str, dict[str, Any]]:
    """Parse, configure, build, write. The parser must live as long as the network, because it holds the
    weights.
    """
    errors: list[str] = []
    logger = _logger(trt, channel, errors)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # pybind's error for a null pointer
        return "unavailable", {"reason": f"{backend.module} does not start ({'; '.join(errors) or error})"}
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(spec["onnx"]):
        return "refused", {"stage": "parse", "errors": list(_parser_errors(parser, errors))}
    described = {
        "inputs": _describe([network.get_input(index) for index in range(network.num_inputs)]),
        "outputs": _describe([network.get_output(index) for index in range(network.num_outputs)]),
    }
    config = builder.create_builder_config()
    monitor = _monitor(trt, channel)
    config.progress_monitor = monitor
    refusal = _set_capability(trt, config, spec["sm"]) if backend.cross else ""
    refusal = refusal or _set_compatibility(trt, config, spec)
    refusal = refusal or _add_profiles(builder, config, spec["profiles"])
    file = Path(spec["timing_cache"]) if spec["timing_cache"] else None
    if file is not None:
        refusal = refusal or _use_timing_cache(config, file, errors)
    if refusal:
        return "refused", {"stage": "configure", "errors": [_error(text) for text in [refusal, *errors]]}
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        texts = errors or ["the builder gave no reason"]
        return "refused", {"stage": "build", "errors": [_error(text) for text in texts]}
    try:
        _write(Path(spec["plan"]), plan)
    except OSError as fault:  # a full disk, most often
        return "unwritten", {"errno": fault.errno, "file": spec["plan"]}
    timed = None
    if file is not None:
        try:
            timed = _keep_timing_cache(config, file)
        except OSError as error:  # the engine itself is written
            channel.say("message", severity="warning", text=f"the timing cache was not written: {error}")
    channel.say("progress", phase="Engine written", fraction=1.0)
    return "done", {**described, "timing_cache": timed}


def _network_flags(trt: ModuleType) -> int:
    """Flags for types that come from the graph alone: STRONGLY_TYPED in TensorRT 10; later versions have
    no other mode.
    """
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0


def _parser_errors(parser: Any, errors: list[str]) -> Iterator[dict[str, str]]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        yield _error(error.desc(), error.node_name(), error.node_operator())
    if not parser.num_errors:
        yield from (_error(text) for text in errors or ["the ONNX parser gave no reason"])


def _describe(tensors: list[Any]) -> dict[str, Any]:
    return {tensor.name: {"shape": list(tensor.shape), "type": tensor.dtype.name} for tensor in tensors}


def _set_capability(trt: ModuleType, config: Any, sm: int) -> str:
    """Build for a compute capability instead of this machine's GPU; returns an error text, or nothing."""
    capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
    if capability is None:
        return f"this version does not build for SM{sm}"
    config.num_compute_capabilities = 1
    return "" if config.set_compute_capability(capability, 0) else f"SM{sm} was not accepted as a target"


def _set_compatibility(trt: ModuleType, config: Any, spec: dict[str, Any]) -> str:
    """Set the versions and GPUs on which the plan can run; returns an error text, or nothing."""
    if spec["version_compatible"]:
        flag = trt.BuilderFlag
        config.set_flag(flag.VERSION_COMPATIBLE)
    if spec["hardware_compatibility"] == "none":
        return ""
    name = spec["hardware_compatibility"].upper().replace("-", "_")
    level = getattr(trt.HardwareCompatibilityLevel, name, None)
    if level is None:
        return f"this version has no hardware compatibility {name}"
    config.hardware_compatibility_level = level
    accepted = config.hardware_compatibility_level == level
    return "" if accepted else f"hardware compatibility {name} was not accepted"


def _use_timing_cache(config: Any, file: Path, errors: list[str]) -> str:
    """Load the timings of an earlier build; returns an error text, or nothing. A file of another TensorRT or
    another device is left unchanged.
    """
    content, errors_before = file.read_bytes() if file.is_file() else b"", len(errors)
    cache = config.create_timing_cache(content)
    if cache is None or len(errors) > errors_before or not config.set_timing_cache(cache, False):
        return f"{file} is not a timing cache of this version and this device: name another file"
    return ""


def _keep_timing_cache(config: Any, file: Path) -> dict[str, int]:
    """Write the timing cache; returns the file's size in bytes before and after."""
    read = file.stat().st_size if file.is_file() else 0
    cache = config.get_timing_cache()
    _write(file, cache.serialize())
    return {"read": read, "written": file.stat().st_size}


def _add_profiles(builder: Any, config: Any, profiles: list[dict[str, list[list[int]]]]) -> str:
    """Add one optimization profile for each entry; returns an error text, or nothing."""
    for number, shapes in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for name, (low, opt, high) in shapes.items():
            try:
                profile.set_shape(name, low, opt, high)
            except ValueError as error:
                return f"profile {number}, input {name}: {error}"
        if config.add_optimization_profile(profile) < 0:
            return f"profile {number} was not accepted: {shapes}"
    return ""


def _write(path: Path, plan: Any) -> None:
    """Write the engine atomically, so that a reader never sees an unfinished file."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(plan)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
