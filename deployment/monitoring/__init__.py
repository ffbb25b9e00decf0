"""The dashboard, and the check of it and of the alert rules against a real Prometheus."""
