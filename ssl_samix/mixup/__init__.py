"""Mixing: plans, policies, and the objectives that combine them with a method."""
