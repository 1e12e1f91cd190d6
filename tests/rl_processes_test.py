"""Rollouts on two processes, drawn one step ahead: the bits of one process, also if they are stopped on the way."""

import processes
import pytest
import rl_small
import small

STAGES = [
    {"name": "worked", "steps": 2, "mixture": {"three": 1.0}, "learn": "sft"},
    {"name": "three", "steps": 4, "mixture": {"three": 1.0}},
    {"name": "four", "steps": 10, "mixture": {"four": 0.7, "three": 0.3}},
]


@pytest.mark.slow
def test_two_processes_change_no_bit_and_neither_does_a_stop(tmp_path):
    settings = rl_small.config(
        mesh={"data": 2},
        stream__stages=STAGES,
        objective="grpo",
        method="reptile(every=4, keep=0.5)",
        rollout={"group": 4, "samples": 2, "modes": [], "ahead": True},
        checkpoint__every_steps=100,  # what is saved at the stop is all there is to go on from
    )
    config = rl_small.write(settings, tmp_path / "config.py")
    env = small.environment(tmp_path)

    def run(name, count, point="none"):
        arguments = ("run", point, f"--config={config}", f"--workdir={tmp_path / name}")
        processes.finish(processes.start(*arguments, processes=count, devices=2 // count, env=env), timeout=600)

    run("1", 1)
    run("2", 2)
    assert rl_small.outcome(tmp_path / "2") == rl_small.outcome(tmp_path / "1")
    run("again", 2, "SIGTERM:step:7@1")
    step, _, host = small.checkpoint(tmp_path / "again")
    assert 7 <= step < 16
    assert host["feed"]["told"]  # rows of the next step wait, drawn from parameters that are gone
    assert rl_small.events(tmp_path / "again") == [(step, "stopped")]
    run("again", 2)
    assert (step, "restore") in rl_small.events(tmp_path / "again")
    assert rl_small.outcome(tmp_path / "again") == rl_small.outcome(tmp_path / "2")
