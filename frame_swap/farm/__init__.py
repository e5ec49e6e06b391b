"""Who compiles: the service that queues jobs, and the workers. Knows no frames."""
