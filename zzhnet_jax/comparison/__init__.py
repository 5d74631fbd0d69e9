"""Compares implementations of the selective scan: numerically, in time and in memory."""
