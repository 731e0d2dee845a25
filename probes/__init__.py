"""What models do inside: activations, refusal probes, traces and cliffs, attention heads that suppress refusal."""
