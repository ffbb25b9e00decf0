"""/metrics: reads the engine, the plan and the driver at each scrape.

Only here prometheus_client is imported.
"""
