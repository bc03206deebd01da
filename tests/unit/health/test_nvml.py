"""NVML against a recorded module; against the real one where there is a driver."""

import inspect
from typing import Any

import pytest
from unit.health import fake_nvml
from unit.health.fake_nvml import FakeNvml, Gpu

from revivemoe.health.nvml import MAX_EVENTS_PER_POLL, MILD_HOLD_S, RECOVERY_LEVELS, NvmlSource
from revivemoe.health.xids import XID_LEVELS, xid_level
from revivemoe.ids import RankId
from revivemoe.recovery.faults import DeviceReport

R0, R1, R2 = RankId(0), RankId(1), RankId(2)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """Two GPUs; ranks 0 and 2 share the first."""

    def __init__(self) -> None:
        self.gpus = (Gpu("GPU-a"), Gpu("GPU-b"))
        self.nvml = FakeNvml(*self.gpus)
        self.clock = Clock()
        self.source = NvmlSource(self.nvml, {0: [R0, R2], "GPU-b": [R1]}, self.clock)

    def poll(self) -> dict[tuple[int, str], int]:
        """(rank, code) -> level."""
        reports = self.source.poll()
        assert all(r.source == "nvml" and r.detail for r in reports)
        found = {(int(r.rank), r.code): r.level for r in reports}
        assert len(found) == len(reports)
        return found


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_healthy_devices_say_nothing(bench: Bench) -> None:
    assert bench.nvml.opened == 0, "nothing is opened before the first poll"
    assert bench.poll() == {}
    assert bench.poll() == {}
    assert bench.nvml.sets == [{"GPU-a", "GPU-b"}]
    bench.source.close()
    assert (bench.nvml.opened, bench.nvml.sets) == (0, [])


def test_an_xid_is_reported_once_for_each_rank_of_its_device(bench: Bench) -> None:
    bench.poll()
    bench.nvml.xid(bench.gpus[0], 95)
    assert bench.poll() == {(0, "xid-95"): 5, (2, "xid-95"): 5}
    assert bench.poll() == {}
    bench.nvml.xid(bench.gpus[0], 95)
    assert bench.poll() == {(0, "xid-95"): 5, (2, "xid-95"): 5}, "of its next process, perhaps"
    bench.nvml.xid(bench.gpus[1], 79)
    bench.nvml.xid(bench.gpus[1], 9999)
    assert bench.poll() == {(1, "xid-79"): 6, (1, "xid-9999"): 2}


def test_ranks_that_share_a_device_are_told_of_together(bench: Bench) -> None:
    bench.poll()
    bench.nvml.xid(bench.gpus[0], 95)
    bench.nvml.xid(bench.gpus[1], 95)
    assert {(r.rank, r.shared) for r in bench.source.poll()} == {(0, (0, 2)), (2, (0, 2)), (1, ())}


def test_a_mild_xid_passes_and_a_severe_one_stays(bench: Bench) -> None:
    bench.poll()
    bench.nvml.xid(bench.gpus[1], 31)
    bench.nvml.xid(bench.gpus[1], 64)
    assert bench.poll() == {(1, "xid-31"): 2, (1, "xid-64"): 5}
    bench.clock.now += MILD_HOLD_S / 2
    bench.nvml.xid(bench.gpus[1], 31)
    assert bench.poll() == {}
    bench.clock.now += MILD_HOLD_S * 0.9
    assert bench.poll() == {}, "seen again: its time begins again"
    bench.clock.now += MILD_HOLD_S
    assert bench.poll() == {(1, "xid-31"): 0}
    bench.nvml.xid(bench.gpus[1], 31)
    assert bench.poll() == {(1, "xid-31"): 2}


def test_a_storm_of_events_does_not_hold_up_a_poll(bench: Bench) -> None:
    bench.poll()
    bench.nvml.waits_ms.clear()
    for _ in range(MAX_EVENTS_PER_POLL + 1):
        bench.nvml.xid(bench.gpus[0], 13)
    bench.poll()
    assert len(bench.nvml.queue) == 1
    first, *rest = bench.nvml.waits_ms
    assert (first > 0, set(rest)) == (True, {0})


def test_uncorrected_ecc_counts_from_the_first_look(bench: Bench) -> None:
    bench.gpus[0].ecc = 7
    assert bench.poll() == {}
    bench.gpus[0].ecc = 8
    assert bench.poll() == {(0, "ecc-uncorrected"): 4, (2, "ecc-uncorrected"): 4}
    bench.gpus[0].ecc = 0
    assert bench.poll() == {(0, "ecc-uncorrected"): 0, (2, "ecc-uncorrected"): 0}
    bench.gpus[0].ecc = 1
    assert (0, "ecc-uncorrected") in bench.poll(), "after a reset the count begins at nought"


def test_row_remapping(bench: Bench) -> None:
    bench.gpus[1].pending = 1
    assert bench.poll() == {(1, "row-remap-pending"): 4}
    bench.gpus[1].pending, bench.gpus[1].failed = 0, 1
    assert bench.poll() == {(1, "row-remap-pending"): 0, (1, "row-remap-failed"): 5}


@pytest.mark.parametrize("action", [0, *RECOVERY_LEVELS, 99])
def test_the_recovery_action_of_the_driver(bench: Bench, action: int) -> None:
    bench.gpus[1].action = action
    known = action in RECOVERY_LEVELS
    expected = {(1, f"recovery-action-{action}"): RECOVERY_LEVELS[action][0]} if known else {}
    assert bench.poll() == expected


@pytest.mark.parametrize("error", ["GpuIsLost", "NotFound", "GpuNotFound"])
@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_lost_device(bench: Bench, error: str, from_the_start: bool) -> None:
    if not from_the_start:
        bench.poll()
        bench.nvml.xid(bench.gpus[0], 79)  # the event's device cannot be asked any more
    bench.gpus[0].error = getattr(fake_nvml, f"NVMLError_{error}")("lost")
    assert bench.poll() == {(0, "gpu-lost"): 6, (2, "gpu-lost"): 6}
    assert bench.poll() == {}
    bench.nvml.xid(bench.gpus[1], 94)
    assert bench.poll() == {(1, "xid-94"): 4}, "the others are watched on"


def test_a_device_that_wants_a_reset(bench: Bench) -> None:
    bench.gpus[1].error = fake_nvml.NVMLError_ResetRequired()
    assert bench.poll() == {(1, "reset-required"): 5}
    bench.gpus[1].error = None
    assert bench.poll() == {(1, "reset-required"): 0}
    bench.nvml.xid(bench.gpus[1], 46)
    assert bench.poll() == {(1, "xid-46"): 5}, "registered for events once it could be had"


def test_what_a_device_does_not_support_is_left_out(bench: Bench) -> None:
    bench.gpus[1].lacks = {
        "nvmlDeviceRegisterEvents",
        "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetRemappedRows",
        "nvmlDeviceGetFieldValues",
    }
    assert bench.poll() == {}
    assert bench.nvml.sets == [{"GPU-a"}]


EVENTS = {"nvmlEventSetCreate", "nvmlEventSetWait_v2", "nvmlEventSetWait"}


@pytest.mark.parametrize(
    "absent",
    [
        {"NVML_FI_DEV_GET_GPU_RECOVERY_ACTION"},
        {"NVMLError_ResetRequired"},
        {"NVMLError_GpuNotFound"},
        {"NVMLError_FunctionNotFound"},
        {"NVML_VOLATILE_ECC"},
        {"nvmlDeviceGetRemappedRows"},
        {"nvmlDeviceGetFieldValues"},
        {"nvmlDeviceGetTotalEccErrors"},
        {"nvmlEventSetWait_v2"},
        EVENTS,
        {"nvmlEventTypeXidCriticalError"},
    ],
)
def test_an_older_module_is_asked_for_what_it_has(bench: Bench, absent: set[str]) -> None:
    """One absent name raised at every poll, and nothing was watched for ever."""
    bench.nvml.absent = absent
    bench.source = NvmlSource(bench.nvml, {0: [R0, R2], "GPU-b": [R1]}, bench.clock)
    assert bench.poll() == {}
    no_events = absent & {"nvmlEventTypeXidCriticalError", "nvmlEventSetCreate"}
    if not no_events:
        bench.nvml.xid(bench.gpus[1], 79)
    assert bench.poll() == ({} if no_events else {(1, "xid-79"): 6})
    bench.gpus[0].error = fake_nvml.NVMLError_GpuIsLost("lost")
    assert bench.poll() == {(0, "gpu-lost"): 6, (2, "gpu-lost"): 6}


def test_functions_that_the_driver_lacks_are_left_out(bench: Bench) -> None:
    bench.gpus[1].old_driver = {"nvmlDeviceGetRemappedRows", "nvmlDeviceGetTotalEccErrors"}
    assert bench.poll() == {}
    bench.nvml.xid(bench.gpus[1], 79)
    assert bench.poll() == {(1, "xid-79"): 6}


A, B = "GPU-8e9f2a3c-1b2d-4c5e-8f90-a1b2c3d4e5f6", "GPU-8e9f7777-1b2d-4c5e-8f90-a1b2c3d4e5f6"


@pytest.mark.parametrize(
    ("name", "watched"),
    [
        (B, True),
        ("GPU-8e9f7", True),
        ("gpu-8E9F7", True),
        ("GPU-8e9f", False),
        ("GPU-1234", False),
        ("-1", False),
        (7, False),
    ],
)
def test_a_device_by_the_name_that_cuda_takes(
    name: str | int, watched: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The beginning of a UUID in CUDA_VISIBLE_DEVICES read as a lost GPU, L6."""
    nvml = FakeNvml(Gpu(A), Gpu(B))
    source = NvmlSource(nvml, {name: [R1]})
    assert source.poll() == source.poll() == []
    assert len(caplog.messages) == (0 if watched else 1), "said once"
    nvml.gpus[1].error = fake_nvml.NVMLError_GpuIsLost("lost")
    found = [(r.rank, r.code, r.level) for r in source.poll()]
    assert found == ([(1, "gpu-lost", 6)] if watched else [])


def test_a_whole_uuid_that_is_not_there_is_a_lost_device() -> None:
    source = NvmlSource(FakeNvml(Gpu(A)), {B: [R1]})
    assert [(r.code, r.level) for r in source.poll()] == [("gpu-lost", 6)]


def test_an_error_of_all_devices_is_raised(bench: Bench) -> None:
    bench.poll()
    for gpu in bench.gpus:
        gpu.error = fake_nvml.NVMLError_Unknown()
    with pytest.raises(fake_nvml.NVMLError_Unknown):
        bench.poll()
    assert bench.nvml.opened == 0, "the next one begins with a new session"
    for gpu in bench.gpus:
        gpu.error = None
    assert bench.poll() == {}
    assert bench.nvml.opened == 1


def test_a_session_that_cannot_even_be_closed_is_not_used_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise fake_nvml.NVMLError_Unknown

    bench.poll()
    for gpu in bench.gpus:
        gpu.error = fake_nvml.NVMLError_Unknown()
    with monkeypatch.context() as patch:
        patch.setattr(bench.nvml, "nvmlEventSetFree", broken)
        with pytest.raises(fake_nvml.NVMLError_Unknown):
            bench.poll()
    for gpu in bench.gpus:
        gpu.error = None
    assert bench.poll() == {}
    assert {"GPU-a", "GPU-b"} == bench.nvml.sets[-1], "registered in a new one"
    assert len(bench.nvml.sets) == 2


def test_a_device_that_cannot_be_asked_silences_no_other(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.gpus[0].pending = 1
    assert bench.poll() == {(0, "row-remap-pending"): 4, (2, "row-remap-pending"): 4}
    bench.gpus[0].error = fake_nvml.NVMLError_Unknown()
    bench.nvml.xid(bench.gpus[1], 79)
    assert bench.poll() == {(1, "xid-79"): 6}, "and it is as it was"
    assert bench.poll() == {}
    assert len(caplog.messages) == 1
    bench.gpus[0].error, bench.gpus[0].pending = None, 0
    assert bench.poll() == {(0, "row-remap-pending"): 0, (2, "row-remap-pending"): 0}


def test_events_that_cannot_be_had_silence_no_query(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait for them raised at every poll: no device was ever asked again."""
    assert bench.poll() == {}
    bench.nvml.wait_error = fake_nvml.NVMLError_Unknown("no more")
    bench.nvml.xid(bench.gpus[1], 79)
    bench.gpus[1].pending = 1
    assert bench.poll() == {(1, "xid-79"): 6, (1, "row-remap-pending"): 4}
    assert bench.nvml.opened == 0, "the next one begins with a new session"
    bench.gpus[1].pending = 0
    assert bench.poll() == {(1, "row-remap-pending"): 0}
    (said,) = caplog.messages
    assert "Xids of 0, GPU-b cannot be had" in said
    assert "Unknown: no more" in said
    bench.nvml.wait_error = None
    assert bench.poll() == {}
    bench.nvml.xid(bench.gpus[0], 95)
    assert bench.poll() == {(0, "xid-95"): 5, (2, "xid-95"): 5}
    assert bench.nvml.sets == [{"GPU-a", "GPU-b"}]


@pytest.mark.parametrize("what", ["the set", "one device"])
def test_events_that_cannot_be_asked_for_silence_no_query(
    what: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """No device was ever asked, or the one of them."""
    error = fake_nvml.NVMLError_Unknown("not now")
    if what == "the set":
        bench.nvml.create_error = error
    else:
        bench.gpus[1].register_error = error
    bench.gpus[1].pending = 1
    assert bench.poll() == {(1, "row-remap-pending"): 4}
    if what == "one device":
        bench.nvml.xid(bench.gpus[0], 95)
    assert bench.poll() == ({} if what == "the set" else {(0, "xid-95"): 5, (2, "xid-95"): 5})
    (said,) = caplog.messages
    assert "Unknown: not now" in said
    assert f"Xids of {'0, GPU-b' if what == 'the set' else 'GPU-b'} cannot be had" in said
    bench.nvml.create_error = bench.gpus[1].register_error = None
    bench.poll()
    bench.nvml.xid(bench.gpus[1], 79)
    assert bench.poll() == {(1, "xid-79"): 6}


def test_a_lost_device_deafens_nobody_to_the_others(bench: Bench) -> None:
    """The wait for events of all of them said no more than that one is lost, for ever."""
    bench.poll()
    bench.gpus[0].error = fake_nvml.NVMLError_GpuIsLost("lost")
    assert bench.poll() == {(0, "gpu-lost"): 6, (2, "gpu-lost"): 6}
    assert bench.poll() == {}
    assert bench.nvml.sets == [{"GPU-b"}]
    bench.nvml.xid(bench.gpus[1], 95)
    assert bench.poll() == {(1, "xid-95"): 5}
    bench.gpus[0].error = None
    assert bench.poll() == {(0, "gpu-lost"): 0, (2, "gpu-lost"): 0}
    bench.nvml.xid(bench.gpus[0], 95)
    assert bench.poll() == {(0, "xid-95"): 5, (2, "xid-95"): 5}


@pytest.mark.parametrize("names", [(f"MIG-{B}/1/0", f"MIG-{B}/2/0"), ("MIG-1", "MIG-2")])
def test_what_a_gpu_says_is_said_of_all_its_parts(names: tuple[str, str]) -> None:
    """Ranks of all but the last were never told of an Xid, and of the rest not together."""
    nvml = FakeNvml(Gpu(A), Gpu(B))
    nvml.parts = tuple(fake_nvml.Part(name, nvml.gpus[1]) for name in ("MIG-1", "MIG-2"))
    source = NvmlSource(nvml, {names[0]: [R0], names[1]: [R1], A: [R2]})
    assert source.poll() == []
    for gpu in nvml.gpus:
        nvml.xid(gpu, 94)
        gpu.pending = 1
    said = {(r.rank, r.code, r.shared) for r in source.poll()}
    both = {(rank, code, shared) for rank, shared in ((0, (0, 1)), (1, (0, 1)), (2, ()))
            for code in ("xid-94", "row-remap-pending")}  # fmt: skip
    assert said == both
    nvml.gpus[1].error = fake_nvml.NVMLError_GpuIsLost("lost")
    lost = {(r.rank, r.shared) for r in source.poll() if r.code == "gpu-lost"}
    assert lost == {(0, (0, 1)), (1, (0, 1))}


def test_an_xid_that_asks_for_a_retry_asks_each_time(bench: Bench) -> None:
    """The denser a fault was, the less was done."""
    for _ in range(3):
        bench.nvml.xid(bench.gpus[1], 39)
        assert bench.poll() == {(1, "xid-39"): 3}
    assert bench.poll() == {}


def test_other_devices_that_we_may_not_see() -> None:
    nvml = FakeNvml(Gpu(A), Gpu(B))
    nvml.gpus[0].error = fake_nvml.NVMLError_Unknown()
    nvml.gpus[1].pending = 1
    assert [r.code for r in NvmlSource(nvml, {B[:10]: [R1]}).poll()] == ["row-remap-pending"]


def test_a_part_of_a_gpu_by_its_older_name() -> None:
    """MIG-GPU-<uuid>/<gi>/<ci> read as a lost GPU, L6."""
    nvml = FakeNvml(Gpu(A), Gpu(B))
    source = NvmlSource(nvml, {f"MIG-{B}/1/0": [R1], "MIG-8e9f2a3c-1b2d-4c5e-8f90-0": [R2]})
    assert source.poll() == []
    nvml.gpus[1].pending = 1
    assert [(r.rank, r.code) for r in source.poll()] == [(1, "row-remap-pending")]


def test_opening_fails_whole_and_can_be_tried_again(bench: Bench) -> None:
    bench.nvml.no_driver = True
    with pytest.raises(fake_nvml.NVMLError_LibraryNotFound):
        bench.poll()
    bench.nvml.no_driver = False
    for gpu in bench.gpus:
        gpu.error = fake_nvml.NVMLError_Unknown()
    with pytest.raises(fake_nvml.NVMLError_Unknown):
        bench.poll()
    assert (bench.nvml.opened, bench.nvml.sets) == (0, [])
    bench.source.close()
    for gpu in bench.gpus:
        gpu.error = None
    assert bench.poll() == {}
    assert bench.nvml.opened == 1


def test_the_table_of_xids() -> None:
    assert all(1 <= level <= 6 and meaning for level, meaning in XID_LEVELS.values())
    assert {xid for xid, (level, _) in XID_LEVELS.items() if level == 6} == {79}
    assert all(xid_level(xid)[0] <= 2 for xid in (13, 31, 43, 45, 68)), "the application's"
    assert all(xid_level(xid)[0] == 4 for xid in (48, 63, 94)), "drain"
    assert all(xid_level(xid)[0] == 5 for xid in (64, 74, 95, 119, 120, 140)), "reset"


# ---- the real module ------------------------------------------------------------------------


def test_the_fake_has_the_names_of_the_real_one() -> None:
    pynvml: Any = pytest.importorskip("pynvml")
    constants = [n for n, v in vars(fake_nvml).items() if isinstance(v, int) and n[0] != "_"]
    assert {n: getattr(pynvml, n) for n in constants} == {
        n: getattr(fake_nvml, n) for n in constants
    }
    for name, value in vars(fake_nvml).items():
        if inspect.isclass(value) and name.startswith("NVMLError"):
            assert issubclass(getattr(pynvml, name), pynvml.NVMLError), name
    functions = [n for n in vars(FakeNvml) if n.startswith("nvml")]
    assert len(functions) > 10
    for name in functions:
        real = list(inspect.signature(getattr(pynvml, name)).parameters)
        ours = list(inspect.signature(getattr(FakeNvml, name)).parameters)[1:]
        assert ours == real, name
    event = {name for name, _ in pynvml.c_nvmlEventData_t._fields_}
    fake = FakeNvml()
    fake.xid(Gpu("GPU-a"), 1)
    assert set(vars(fake.queue[0])) == event
    assert {"nvmlReturn", "value"} <= {name for name, _ in pynvml.c_nvmlFieldValue_t._fields_}
    assert "uiVal" in {name for name, _ in pynvml.c_nvmlValue_t._fields_}


@pytest.mark.gpu
def test_a_real_device_is_polled() -> None:
    pynvml: Any = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pytest.skip(f"no NVML: {error}")
    source = NvmlSource(pynvml, {0: [R0]})
    try:
        first = source.poll()
        assert all(isinstance(report, DeviceReport) for report in first)
        assert source.poll() == [], "nothing changes on a device that is left alone"
    finally:
        source.close()
        pynvml.nvmlShutdown()
