"""Generators on disk: our own format, and other people's, of which nothing is executed."""
