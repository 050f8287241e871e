"""Methods: one short file each, over one base class."""
