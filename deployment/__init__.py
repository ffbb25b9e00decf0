"""Machinery for what is deployed: the chart, the image, the monitoring. Not part of the wheel."""
