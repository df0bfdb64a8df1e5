"""What the engine core must know about our pages: KV cache specs and block managers. Imports layout, never the ops.

Importing the package makes them known to vLLM's scheduler. So a process that holds one of our specs, which it can only
have made or unpickled, knows the manager for it; and a process without one, such as an API server, need not load vLLM's
scheduler.
"""

from vllm_sparq.scheduler.manager import register_specs

register_specs()
