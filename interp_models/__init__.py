"""interp_models."""
