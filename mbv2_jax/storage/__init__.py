"""A folder on a disk or in a bucket."""
