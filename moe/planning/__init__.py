"""What a run costs before it runs: weights, memory, traffic and time of a rank, in closed form."""
