"""What several Triton ops share: launches, codes, attention over tiles, scores, and the choice of tokens."""
