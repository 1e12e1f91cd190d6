"""Rollouts on two processes, drawn one step ahead: the bits of one process."""

import processes
import rl_small
import small


def test_two_processes_change_no_bit(tmp_path):
    settings = rl_small.config(
        mesh={"data": 2},
        objective="grpo",
        method="reptile(every=4, keep=0.5)",
        rollout={"group": 4, "samples": 2, "modes": [], "ahead": True},
    )
    config = rl_small.write(settings, tmp_path / "config.py")
    env = small.environment(tmp_path)
    for count in (1, 2):
        arguments = ("run", "none", f"--config={config}", f"--workdir={tmp_path / str(count)}")
        processes.finish(processes.start(*arguments, processes=count, devices=2 // count, env=env), timeout=600)
    assert rl_small.outcome(tmp_path / "2") == rl_small.outcome(tmp_path / "1")
