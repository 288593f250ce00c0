"""Training encoders without labels."""
