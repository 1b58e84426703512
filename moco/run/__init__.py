"""What any long job needs: processes, signals, checkpoints, logs."""
