"""How fast this machine answers, beside what it could do: measured in one run, so that ratios mean something."""
