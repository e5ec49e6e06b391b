"""What serves the calls of a region: eager code, compiled code, and the trampoline that chooses."""
