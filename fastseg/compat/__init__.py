"""Stand-ins for other libraries: change the import and keep the code."""
