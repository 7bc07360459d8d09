"""Ways to adapt the backbone: deep prompts, and three baselines to compare them with. One interface (`method`)."""

from promptmux_server.training.methods.adapters import Adapters
from promptmux_server.training.methods.bitfit import BitFit
from promptmux_server.training.methods.finetune import FineTuning
from promptmux_server.training.methods.method import Method, trainable
from promptmux_server.training.methods.named import weights_method
from promptmux_server.training.methods.prompts import DeepPrompts

__all__ = ["Adapters", "BitFit", "DeepPrompts", "FineTuning", "Method", "trainable", "weights_method"]
