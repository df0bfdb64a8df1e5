"""Methods by their definitions, over whole masks of a small model, beside what the engine answers."""
