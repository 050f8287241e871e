"""Evaluation protocols, installed as ssl_samix.eval_protocols."""
