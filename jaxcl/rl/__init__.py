"""Reinforcement learning with verifiable rewards, for tokens and for continuous thoughts."""
