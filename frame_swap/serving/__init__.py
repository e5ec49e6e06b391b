"""What serves the calls of a region: the eager pair, compiled code, and the trampoline that chooses."""
