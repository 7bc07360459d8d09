"""Learning prompts on a frozen backbone. Shares the forward pass with serving and nothing else with it."""
