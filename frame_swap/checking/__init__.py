"""Compiled code on trial: does it compute what the pair computes, and is that worth it?

Knows no processes and no frames, but for `repro`, which compiles what is in a folder once more.
"""
