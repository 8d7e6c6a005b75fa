from __future__ import annotations

import ctypes

import pytest

from qcompress.system.gpu import compute_capability


class Driver:
    """A CUDA driver with one GPU. `failing` names the call that reports an error."""

    def __init__(self, capability: tuple[int, int], failing: str = "") -> None:
        self.capability, self.failing = capability, failing

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return 100 if self.failing == "cuInit" else 0

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
        count._obj.value = 1
        return 2 if self.failing == "cuDeviceGetCount" else 0

    def cuDeviceGet(self, device: object, ordinal: int) -> int:  # noqa: N802
        assert ordinal == 0
        device._obj.value = 7
        return 101 if self.failing == "cuDeviceGet" else 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        assert device.value == 7
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 1 if self.failing == "cuDeviceGetAttribute" else 0


@pytest.mark.parametrize(("capability", "sm"), [((8, 6), 86), ((9, 0), 90), ((12, 0), 120), ((11, 0), 110)])
def test_the_first_gpu_is_known_by_its_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], sm: int
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(capability))
    assert compute_capability() == sm


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver((8, 6), failing=call))
    assert compute_capability() is None


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert compute_capability() is None
