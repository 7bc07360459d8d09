"""The HTTP edge: routes, schemas, limits, errors, metrics. Knows nothing of tensors; the engine is behind a Protocol."""
