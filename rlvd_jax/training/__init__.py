"""Training: GRPO and SFT on packed batches over a mesh of devices."""
