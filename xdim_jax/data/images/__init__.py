"""Image files to arrays in one orientation, and back."""
