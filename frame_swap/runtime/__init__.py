"""What threads, processes and the machine need, whatever runs on them. Knows nothing of graphs."""
