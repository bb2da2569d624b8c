"""What a model does with memory while it trains: what is computed again, leaves the GPU, is done piece by piece."""
