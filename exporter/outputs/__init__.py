"""The files of the output that hold no weights, and its packaging."""
