"""What features are worth: statistics of features, nearest neighbors, and linear evaluation."""
