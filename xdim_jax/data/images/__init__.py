"""Reading image files as arrays in one orientation, and writing arrays back."""
