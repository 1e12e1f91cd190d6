"""Documents in, batches out: sources, tokenizer, packed rows, and a stream that is a function of the step."""
