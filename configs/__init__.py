"""The Hydra configurations, installed as ssl_samix.configs."""
