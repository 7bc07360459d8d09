"""The engine: one thread that turns queued requests into answers, in mixed-task batches. Knows nothing of HTTP."""
