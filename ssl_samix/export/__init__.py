"""A trained encoder as other libraries and runtimes read it."""
