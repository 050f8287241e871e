"""Mixing: the plan, the policies and the objective that joins them to a method."""
