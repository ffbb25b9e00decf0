"""One-shot job: a base checkpoint and LoRA adapters in, merged bf16 safetensors shards out."""
