"""Who hears how an export goes on."""


class Listener:
    """One that does not listen."""

    def progress(self, done_bytes: int, total_bytes: int, shard: str) -> None:
        """Bytes of weights that are merged, and the shard that is being written."""

    def say(self, sentence: str) -> None:
        """What is begun now, or should be known."""
