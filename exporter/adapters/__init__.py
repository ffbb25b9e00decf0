"""LoRA adapters: what one holds, which tensors of the base it changes, and how."""
