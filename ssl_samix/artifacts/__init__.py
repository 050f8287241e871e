"""What is written and read back: run folders, checkpoints, encoders, exports."""
