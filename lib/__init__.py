"""Plumbing that one trusts and does not edit: no variant of prompt, reward, advantage or loss touches it."""
