"""The engine: one thread that answers queued requests in mixed-task batches. Knows nothing of HTTP."""
