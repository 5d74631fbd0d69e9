"""The networks: one folder a family, a registry by name, and saved models."""
