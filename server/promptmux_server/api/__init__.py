"""HTTP: routes, limits, metrics, and the one map from errors to answers. Reaches the engine through its port only."""
