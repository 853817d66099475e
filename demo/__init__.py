"""The embedded default: a small picture world, tiny models of the real classes, a rule-based teacher."""
