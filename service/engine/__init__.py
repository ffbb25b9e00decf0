"""Steps requests through the model. Knows no web, no pydantic, no prometheus."""
