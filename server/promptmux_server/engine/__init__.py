"""The engine: one thread, one running batch of any tasks, which requests join and leave at every step.

A request's life, file by file:

1. `admission` checks it and makes a `ticket`; `registry` resolves its task to a prompt version, which `prompt_tiers`
   begins to bring to the device; `pictures` begins to prepare its picture.
2. `scheduler` keeps it in a fair queue (order: `fair_order`; cost of a request: `cost_model`).
3. `engine` takes it when picture, prompt and decoding `memory` are there: the stem sees the picture unless
   `image_cache` holds it, `runner` encodes it, and from then on it takes a token a step with all others; its search
   is in `decoding`.
4. It leaves with its answer, or when it fails, is late or nobody waits for it, and gives back all it held.

Knows nothing of HTTP.
"""
