"""What the page cache holds of any files, filling it ahead of use, and emptying it again, each time verified."""
