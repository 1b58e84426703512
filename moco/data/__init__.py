"""From image files to augmented views."""
