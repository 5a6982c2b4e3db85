"""Decides whether a mathematical answer is the reference. Runs in the worker processes alone."""
