"""The command ``hbkit``."""
