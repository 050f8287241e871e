"""Reading and writing run folders, checkpoints, encoders, Mixers and exports."""
