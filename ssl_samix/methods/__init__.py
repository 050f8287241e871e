"""Self-supervised methods: each one short file over one base class."""
