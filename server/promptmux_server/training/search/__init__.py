"""Hyper-parameter search: trials of one task learn in one batch on one frozen backbone, and the worse ones are pruned.

Only `study` knows Optuna and only the plots know matplotlib: both come with the extra `train`.
"""
