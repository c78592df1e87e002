"""The architectures of the paper, what they cost, and their fast copies for inference."""
