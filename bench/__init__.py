"""What was measured, and with what: README.md here."""
