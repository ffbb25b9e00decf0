"""`--check-logits`: whether the merged model answers as base and adapter do side by side."""
