"""Compiling ahead of time for accelerators that this machine does not have."""
