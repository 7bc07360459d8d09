"""The OFA backbone: configuration, forward pass, tokenizer, images and weight files. Knows nothing of requests."""
