"""The tiny models: how they are made, what they were taught, and the two that ship."""
