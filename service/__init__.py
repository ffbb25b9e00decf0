"""Serves a loaded model over HTTP."""
