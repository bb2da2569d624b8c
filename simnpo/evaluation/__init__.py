"""What a model still knows: its probabilities and its answers, on your own examples and on the published benchmarks."""
