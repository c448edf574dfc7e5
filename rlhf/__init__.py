"""Rewards of reinforcement learning."""
