"""Cython: one encoding or one data structure a file. Nothing here knows of files, frameworks or configuration."""
