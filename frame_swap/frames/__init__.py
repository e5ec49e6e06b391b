"""Code objects: the hook that sees them, what is written into them, the cache entries that hold them, and the
calls that go straight to them.

Knows no processes and no artifacts.
"""
