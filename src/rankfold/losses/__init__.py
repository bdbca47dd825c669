"""Penalties and losses added to the training objective: one file a method."""
