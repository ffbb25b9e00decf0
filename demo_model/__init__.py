"""Makes the built-in demo model: dialogues, tokenizer, training and the questions that judge it."""
