"""promptmux server: one frozen multimodal backbone, many deep prompts, one batch."""

__version__ = "0.1.0"
