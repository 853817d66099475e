"""The embedded default: a small picture world, a tiny model of the real classes, a rule-based teacher, and run.sh."""
