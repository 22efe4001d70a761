"""The GPU's state while it is timed. No GPU is here: NVML is a stand-in, marked as such."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
from gpu_stand_ins import PCI, FakeNvml, plant

from cswap_deploy.measure import gpu
from cswap_deploy.measure.gpu import GpuMonitor, cuda_pci_bus_id, throttle_reasons
from cswap_deploy.records.measurements import GpuState, Spread
from cswap_deploy.runtime.host import cuda_problem


def nothing() -> None: ...


def sampled(times: int = 3) -> GpuState:
    with GpuMonitor() as monitor:
        for _ in range(times):
            monitor.sample(nothing)
    return monitor.state()


def test_readings_are_reduced_and_units_are_watts(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, FakeNvml())
    state = sampled()
    assert state == GpuState(
        name="NVIDIA L4",
        uuid=f"GPU-{PCI}",
        pci_bus_id=PCI,
        driver="570.124.06",
        persistence_mode=True,
        compute_mode="exclusive process",
        samples=3,
        sm_clock_mhz=Spread(min=1740, median=1740, max=1740),
        sm_clock_max_mhz=2040,
        memory_clock_mhz=Spread(min=6251, median=6251, max=6251),
        power_w=Spread(min=60, median=70, max=72.5),
        power_limit_w=72,
        temperature_c=Spread(min=61, median=61, max=61),
        throttling={"power cap (software)": 3, "temperature (software)": 3},
    )


def test_the_gpu_is_chosen_by_its_pci_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA_VISIBLE_DEVICES=1 CUDA's device 0 is NVML's device 1."""
    plant(monkeypatch, FakeNvml(), bus="0000:17:00.0")
    assert sampled().name == "NVIDIA A2"
    plant(monkeypatch, FakeNvml(), bus=PCI)
    assert sampled().name == "NVIDIA L4"


def test_a_gpu_that_nvml_does_not_know_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, FakeNvml(), bus="0000:99:00.0")
    state = sampled()
    assert (state.samples, state.sm_clock_mhz, state.throttling) == (0, None, None)
    assert state.notes == (
        "GPU state not known: NVML does not know the GPU at 0000:99:00.0: Not Found",
    )


EVERY = tuple(name for name in FakeNvml().answers if name.startswith("nvml"))


@pytest.mark.parametrize("function", EVERY)
def test_every_error_of_nvml_is_a_note(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    newer = {
        "nvmlDeviceGetTemperature": "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetCurrentClocksThrottleReasons": "nvmlDeviceGetCurrentClocksEventReasons",
    }
    renamed = function in newer.values()  # the older name answers instead
    refuse = (function, newer[function]) if function in newer else (function,)
    plant(monkeypatch, FakeNvml(refuse=refuse))
    state = sampled()
    assert len(state.notes) == (2 if function == "nvmlDeviceGetClockInfo" else 0 if renamed else 1)
    assert all(note.endswith("Not Supported") for note in state.notes)


def test_what_an_older_package_calls_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    older = FakeNvml(lacks=("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetTemperatureV"))
    plant(monkeypatch, older)
    state = sampled()
    assert state.throttling == {"temperature (hardware)": 3}
    assert state.temperature_c == Spread(min=60, median=60, max=60)
    assert state.notes == ()
    lacks = ("nvmlDeviceGetEnforcedPowerLimit",)
    plant(monkeypatch, FakeNvml(lacks=lacks))
    assert sampled().notes == (
        "power limit not known: this nvidia-ml-py has no nvmlDeviceGetEnforcedPowerLimit",
    )


def test_without_the_package_a_note_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    state = sampled()
    [note] = state.notes
    assert note.endswith("; fix: pip install nvidia-ml-py")
    assert state == GpuState(notes=(note,))


def test_on_jetson_the_note_names_tegrastats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nv_tegra_release").write_text("# R36")
    plant(monkeypatch, FakeNvml(refuse=("nvmlInit",)))
    monkeypatch.setattr(gpu, "_JETSON", tmp_path / "nv_tegra_release")
    assert sampled().notes == (
        "GPU state not known: NVML does not start: Not Supported; Jetson boards have none, "
        "tegrastats tells the same",
    )


def test_a_sample_is_taken_beside_untimed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread asks NVML, and the GPU is busy until it has its answers."""
    nvml = plant(monkeypatch, FakeNvml())
    worked: list[str] = []
    asked: list[threading.Thread] = []

    def slow(handle: str) -> int:
        asked.append(threading.current_thread())
        while len(worked) < 5:
            time.sleep(0.001)
        return 70_000

    nvml.answers["nvmlDeviceGetPowerUsage"] = slow
    with GpuMonitor() as monitor:
        monitor.sample(lambda: worked.append(threading.current_thread().name))
    assert len(worked) >= 5
    assert set(worked) == {threading.current_thread().name}
    assert asked[0] is not threading.current_thread()
    assert monitor.state().samples == 1


def test_samples_are_taken_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, FakeNvml())
    with GpuMonitor(interval=0.05) as monitor:
        start = time.perf_counter()
        while time.perf_counter() - start < 0.24:
            monitor.between(nothing)
    assert 2 <= monitor.state().samples <= 5
    with GpuMonitor(interval=60) as monitor:
        for _ in range(100):
            monitor.between(nothing)
    assert monitor.state().samples == 1, "the first is due at once"


def test_an_error_of_the_work_ends_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = plant(monkeypatch, FakeNvml())
    nvml.answers["nvmlDeviceGetPowerUsage"] = lambda handle: time.sleep(0.05) or 70_000

    def refused() -> None:
        raise RuntimeError("refused")

    def run() -> None:
        with GpuMonitor() as monitor:
            monitor.sample(refused)

    with pytest.raises(RuntimeError, match="refused"):
        run()
    assert "nvml" not in {thread.name for thread in threading.enumerate()}
    assert nvml.asked[-1] == "nvmlShutdown"


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (0, ()),
        (0x1, ("GPU idle",)),
        (0x64, ("power cap (software)", "temperature (software)", "temperature (hardware)")),
        (0x88, ("slowdown (hardware)", "power brake (hardware)")),
        (0x4000, ("bit 0x4000",)),
    ],
)
def test_the_mask_is_decoded(mask: int, names: tuple[str, ...]) -> None:
    assert throttle_reasons(mask) == names


def test_names_and_bits_are_those_of_the_package() -> None:
    """Held against the real package, where it is installed; it needs no GPU for its constants."""
    pynvml = pytest.importorskip("pynvml")
    stems = {
        "GpuIdle": "GPU idle",
        "ApplicationsClocksSetting": "application clocks",
        "SwPowerCap": "power cap (software)",
        "HwSlowdown": "slowdown (hardware)",
        "SyncBoost": "sync boost",
        "SwThermalSlowdown": "temperature (software)",
        "HwThermalSlowdown": "temperature (hardware)",
        "HwPowerBrakeSlowdown": "power brake (hardware)",
        "DisplayClockSetting": "display clocks",
    }
    for stem, name in stems.items():
        assert throttle_reasons(getattr(pynvml, f"nvmlClocksEventReason{stem}")) == (name,)
    fake = FakeNvml()
    for name in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"):
        assert getattr(pynvml, name) == getattr(fake, name)
    for name in EVERY:
        assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)


def test_without_a_driver_cuda_has_no_address() -> None:
    if not cuda_problem():
        pytest.skip("this machine has a GPU")
    assert cuda_pci_bus_id() == ""
    assert sampled().samples == 0


@pytest.mark.gpu
def test_the_real_gpu_is_read() -> None:
    pytest.importorskip("pynvml")
    if cuda_problem():
        pytest.skip(cuda_problem())
    state = sampled()
    assert state.samples == 3, state.notes
    assert state.name
    assert state.sm_clock_mhz is not None
    assert state.sm_clock_mhz.max > 0
