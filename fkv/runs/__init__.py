"""Run directories, checkpoints, preemption, devices, costs, sweeps, pods, sharing."""
