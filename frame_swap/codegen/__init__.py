"""Code objects and generated functions. Knows no processes and no artifacts."""
