"""The embedded default backbone: the scenes it learned from, its pretraining, its weights."""
