"""Trials of compiled code: does it compute the same as eager code (`verify`), and is it faster (`profit`)?

This package knows no processes and no frames, except `repro`, which compiles a graph again that a folder holds.
"""
