"""From chat messages to token ids."""
