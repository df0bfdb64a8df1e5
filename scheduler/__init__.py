"""What the engine core must know about our pages: KV cache specs. Imports layout, never the ops."""
