"""Tables of several runs, and studies."""
