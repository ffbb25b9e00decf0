"""Machinery for what is deployed: the chart, the image, the monitoring. Not part of the wheel."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
