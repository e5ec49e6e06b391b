"""Whole programs, from capture to the calls of compiled code."""
