"""A folder of runs summarised on one page."""
