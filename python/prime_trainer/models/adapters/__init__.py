"""Policy, PRM and reference as low-rank adapters on one base: views of the model, and their files."""
