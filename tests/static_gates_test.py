"""The static gates: comparison and reading of listings without a compiler, two programs with one."""

import json
import subprocess
import sys

import pytest

from experiments.static import gates, machine_code

OLD = {"forward": {"loop": 100, "spill_loads": 0, "mxu_percent": 80.0, "hgmma_percent": 100.0}}


def statuses(golden, found, failed=None):
    return {row.kernel: row.status for row in gates.compare(golden, found, failed or {})}


def changed(**figures):
    return {"forward": OLD["forward"] | figures}


@pytest.mark.parametrize(
    ("figures", "status"),
    [
        ({}, "ok"),
        ({"loop": 104}, "ok"),
        ({"loop": 105}, "ok"),
        ({"loop": 106}, "WORSE"),
        ({"loop": 96}, "ok"),
        ({"loop": 94}, "BETTER"),
        ({"loop": 94, "mxu_percent": 70.0}, "WORSE"),  # one figure does not pay for another
        ({"spill_loads": 1}, "WORSE"),
        ({"mxu_percent": 77.0}, "ok"),
        ({"mxu_percent": 75.0}, "WORSE"),
        ({"mxu_percent": 85.0}, "BETTER"),
        ({"hgmma_percent": 99.0}, "WORSE"),
        ({"new": 1}, "WORSE"),
    ],
)
def test_five_percent_and_no_more(figures, status):
    assert statuses(OLD, changed(**figures)) == {"forward": status}
    assert gates.Row(status, "forward", "").fails == (status == "WORSE")


def test_a_figure_that_is_no_longer_there_fails():
    assert statuses(OLD, {"forward": {"loop": 100}}) == {"forward": "WORSE"}


def test_lost_unknown_and_broken_kernels_fail():
    found = statuses(OLD | {"gone": OLD["forward"], "broken": OLD["forward"]}, OLD | {"more": {}}, {"broken": "crash"})
    assert found == {"forward": "ok", "gone": "LOST", "more": "UNKNOWN", "broken": "FAILED"}
    assert [gates.Row(x, "", "").fails for x in ("ok", "BETTER", "SKIPPED")] == [False] * 3
    rows = gates.compare(OLD, OLD | {"more": {}, "new": {}}, {}, elsewhere={"forward", "more"})
    assert {row.kernel: row.status for row in rows} == {"forward": "ok", "more": "SKIPPED", "new": "UNKNOWN"}
    assert all(gates.Row(x, "", "").fails for x in ("LOST", "UNKNOWN", "FAILED"))


def test_nothing_recorded_is_a_skip_but_a_crash_is_not():
    rows = gates.compare(None, OLD, {"broken": "crash"})
    assert {row.kernel: row.status for row in rows} == {"forward": "SKIPPED", "broken": "FAILED"}
    assert "loop 100" in rows[1].text  # the figures are shown


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """The command with figures that are not compiled: (arguments, kernels) -> (exit status, what it prints)."""
    monkeypatch.setattr(gates, "GOLDEN", tmp_path / "golden.json")
    monkeypatch.setattr(gates, "ROOT", tmp_path)

    def run(*arguments, installed="cuda", build=lambda program: ({program: {"loop": 100}}, {})):
        monkeypatch.setattr(gates, "compiler", lambda x: ("c 1", []) if x == installed else (None, ["what it needs"]))
        monkeypatch.setattr(gates, "build", build)
        monkeypatch.setattr(sys, "argv", ["gates", *arguments])
        return gates.main(), capsys.readouterr().out

    return run


def test_command_records_compares_and_says_what_it_skips(command):
    status, text = command()
    assert status == 0
    assert "cuda, c 1: SKIPPED, nothing was recorded" in text
    assert "tpu: SKIPPED, what it needs not installed" in text
    assert "0 ok" in text
    status, text = command("--update")
    assert status == 0
    assert "recorded: 10 kernels" in text
    status, text = command()
    assert status == 0
    assert text.splitlines()[-1] == "10 ok, 84 SKIPPED"
    status, text = command(build=lambda program: ({program: {"loop": 106}}, {}))
    assert status == 1
    assert "loop 100 -> 106" in text
    status, text = command(build=lambda program: ({program: {"loop": 90}}, {}))
    assert status == 0
    assert "record it with --update" in text
    status, text = command("--only=h200 64 forward", build=lambda program: ({}, {program: "status -11: "}))
    assert status == 1
    assert "1 FAILED" in text


def test_a_crash_is_not_recorded(command):
    status, _ = command("--update", build=lambda program: ({}, {program: "status -11: "}))
    assert status == 1
    assert not gates.GOLDEN.exists()


def test_part_of_the_programs_keeps_the_other_records(command):
    command("--update")
    command("--update", "--only=h200 64 forward", build=lambda program: ({program: {"loop": 50}}, {}))
    kept = json.loads(gates.GOLDEN.read_text())["c 1"]
    assert len(kept) == 10
    assert kept["attention h200 64 forward"] == {"loop": 50}
    assert kept["attention h200 64 d_keys"] == {"loop": 100}


def test_a_compiler_that_crashes_is_a_failure(monkeypatch):
    crash = subprocess.CompletedProcess([], -11, "", "noise\nSegmentation fault\n")
    monkeypatch.setattr(gates.subprocess, "run", lambda *_, **__: crash)
    figures, failed = gates.build("attention v5p 64")
    assert not figures
    assert failed["attention v5p 64 d_keys"] == "status -11: Segmentation fault"
    assert len(failed) == 3


def test_what_is_recorded_keeps_the_promises():
    """Neither spills nor atomics nor old tensor-core instructions on GPUs; no forward tile above 470 instructions."""
    golden = json.loads(gates.GOLDEN.read_text())
    everything = {p: {n for x in gates.programs(p) for n in machine_code.names(x)} for p in gates.COMPILERS}
    for platform, kernels in everything.items():
        recorded = [set(golden[name]) for name in golden if ("libtpu" in name) == (platform == "tpu")]
        assert all(names <= kernels for names in recorded)
        assert kernels in recorded  # one compiler has them all
    for compiler, kernels in golden.items():
        for name, figures in kernels.items():
            if "h200" in name:
                assert [figures[x] for x in ("stack", "spill_stores", "spill_loads", "atomics")] == [0] * 4, name
                assert figures["hgmma_percent"] == 100, name
                assert figures["registers"] <= (168 if "attention" in name else 255), (
                    name
                )  # of three warpgroups, or one
            else:
                assert figures["bundles"] > 0, name
        if "libtpu" not in compiler:
            assert kernels["attention h200 128 forward"]["pass"] <= 470


REPORT = """ptxas info    : Function properties for kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
# A wait before the loop and one inside it that were moved to the end, and a branch around the mask.
LISTING = """
        /*0000*/                   SYNCS P0, [UR4] ;
   -:-:-:Y:02        /*0010*/              @!P0 BRA `(.L_x_4) ;
.L_x_0:
        /*0020*/                   IMAD R1, R2 ;
.L_x_1:
        /*0030*/                   SYNCS P0, [UR4] ;
        /*0040*/              @!P0 BRA `(.L_x_5) ;
.L_x_2:
        /*0050*/                   HGMMA.64x128x16.F32 R4, R5 ;
        /*0060*/                   BRA P2, `(.L_x_3) ;
        /*0070*/                   FSEL R1, R1 ;
        /*0080*/                   FSEL R1, R1 ;
.L_x_3:
        /*0090*/              @P1  BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   SYNCS P0, [UR4] ;
        /*00c0*/                   BRA `(.L_x_0) ;
.L_x_5:
        /*00d0*/                   SYNCS P0, [UR4] ;
        /*00e0*/                   BRA `(.L_x_2) ;
"""


def test_gpu_listings_are_read():
    figures = machine_code.hopper(REPORT, LISTING)
    assert [figures[x] for x in ("registers", "stack", "spill_stores", "spill_loads")] == [168, 8, 4, 12]
    assert (figures["loop"], figures["pass"], figures["code"]) == (7, 5, 15)
    assert (figures["atomics"], figures["hgmma_percent"]) == (0, 100)
    worse = LISTING.replace("IMAD R1", "RED.E.ADD R1").replace("FSEL R1", "HMMA.16816.F32 R1", 1)
    figures = machine_code.hopper(REPORT, worse)
    assert (figures["atomics"], figures["hgmma_percent"]) == (1, 50)
    for report, listing in (("", LISTING), (REPORT * 2, LISTING), (REPORT, ""), (REPORT, LISTING.replace("HG", "H"))):
        with pytest.raises(ValueError, match="no report and listing"):
            machine_code.hopper(report, listing)


def test_tpu_tables_are_read():
    head = "== CAPACTIY:\nMXU, VLOAD, VLOAD:FILL, VSTORE:SPILL\n    4   3    3   1\n== UTILIZATION:\n"
    figures = machine_code.bundles(head + "4 0 1 0\n2 1 0 1\n0 0 2 0\n")
    assert figures == {"bundles": 3, "mxu_percent": 50.0, "spill_stores": 1, "spill_loads": 3}
    for text in ("", head, head + "1 2\n", "1 2 3 4\n"):
        with pytest.raises(ValueError, match="not a table"):
            machine_code.bundles(text)


def test_a_dump_without_a_kernel_is_an_error(tmp_path):
    for program in ("attention h200 64 forward", "vocabulary v5p"):
        with pytest.raises(ValueError, match="not one each"):
            machine_code.read(program, tmp_path)


@pytest.mark.parametrize(("program", "platform"), [("attention h200 128 forward", "cuda"), ("vocabulary v5e", "tpu")])
def test_machine_code_is_as_it_was(program, platform):
    """Two programs; the command compiles them all."""
    name, missing = gates.compiler(platform)
    golden = json.loads(gates.GOLDEN.read_text())
    if name is None:
        pytest.skip(f"{', '.join(missing)} not installed: machine code not checked")
    found, failed = gates.build(program)
    assert not failed
    if name not in golden:
        pytest.skip(f"nothing recorded for {name}: python -m experiments.static.gates --update; found {found}")
    kernels = machine_code.names(program)
    rows = gates.compare({kernel: golden[name][kernel] for kernel in kernels}, found, failed)
    assert not [row for row in rows if row.fails]
