"""Reinforcement learning of hard and soft chains of thought: what is fed, its density, objectives, sampling, tasks."""
