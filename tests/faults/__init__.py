"""What may go wrong in the background, each thing injected at a chosen moment."""
